"""Verdicts on figures that are known."""

import pytest

from bench.targets import Target, verdicts

MS = {"ours": 2.0, "eager": 8.0, "compiled": 5.0}
HELD = {"ours": 10, "eager": 100, "compiled": 40}
APART = dict.fromkeys(MS, 1.0)


def test_the_fastest_baseline_that_ran_counts():
    (verdict,) = verdicts([Target("ours", ("eager", "compiled", "absent"), 2.0)], MS, HELD, APART)
    assert verdict.ratio == pytest.approx(2.5)
    assert verdict.passed
    assert str(verdict) == "pass  time of compiled over ours: 2.500, asked ≥ 2.0"


def test_a_target_is_missed():
    (verdict,) = verdicts([Target("ours", ("compiled",), 2.51)], MS, HELD, APART)
    assert not verdict.passed
    assert str(verdict).startswith("FAIL")


@pytest.mark.parametrize(("share", "passed"), [(0.25, True), (0.24, False)])
def test_bytes_have_a_verdict_of_their_own(share, passed):
    time, held = verdicts([Target("ours", ("eager", "compiled"), 1.0, share)], MS, HELD, APART)
    assert time.passed
    assert (held.ratio, held.passed) == (pytest.approx(0.25), passed)
    assert "≤" in str(held)


@pytest.mark.parametrize(
    ("ms", "apart", "asked", "passed"),
    [
        (1.99, 1.01, 1.0, True),  # nearer to 1 than the two runs to each other
        (1.97, 1.01, 1.0, False),
        (1.99, 1.04, 1.0, False),  # disturbed: resolves nothing
        (1.99, 1.01, 0.998, False),  # only "no slower" has ties
        (1.99, 1.00, 1.0, False),
    ],
)
def test_no_slower_is_told_to_what_two_runs_resolve(ms, apart, asked, passed):
    apart = {"ours": 1.0, "eager": apart}
    (verdict,) = verdicts(
        [Target("ours", ("eager",), asked)], {"ours": 2.0, "eager": ms}, HELD, apart
    )
    assert verdict.passed == passed
    assert ("two runs are 1.010 apart" in str(verdict)) == passed


@pytest.mark.parametrize("target", [Target("absent", ("eager",), 1.0), Target("ours", ("x",), 1.0)])
def test_what_did_not_run_is_named(target):
    with pytest.raises(ValueError, match=r"(absent|x) did not run, only ours, eager, compiled"):
        verdicts([target], MS, HELD, APART)
