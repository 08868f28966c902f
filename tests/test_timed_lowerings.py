"""``autotune`` for lowerings: what is timed, what is kept, what runs then, and that it is right.

Fragments are compiled and run as they would be; only the clock says what it is told.
"""

import json
import logging

import pytest
import torch
from torch import nn

import flashsvd_compile as fsc
from flashsvd_compile import contest
from flashsvd_compile.tuning import race
from tests.spelled import assert_as_good_as_eager, low_rank

pytestmark = pytest.mark.usefixtures("fresh_inference")

HEADS, RANK, HEAD_DIM, HIDDEN, INNER = 3, 4, 24, 72, 144
AUTOTUNE = {"autotune": True, "compiler": "eager"}
LOGGER = "flashsvd_compile.tuning.race"


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(HIDDEN, HEADS * RANK, bias=False) for _ in "qkv")
        self.factors = nn.ParameterList(torch.randn(HEADS, RANK, HEAD_DIM) / 2 for _ in "qkv")
        self.up, self.back = low_rank(HIDDEN, INNER, 6), low_rank(INNER, HIDDEN, 5)

    def forward(self, x, mask=None):
        latents = [u(x).unflatten(-1, (HEADS, RANK)).transpose(1, 2) for u in self.down]
        q, k, v = (p @ f for p, f in zip(latents, self.factors, strict=True))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        x = x + mixed.transpose(1, 2).flatten(2)
        return x + self.back(nn.functional.gelu(self.up(x)))


def model(layers=2):
    return nn.Sequential(*(Layer() for _ in range(layers)))


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """``clock(row_blocks=2.0, ...)`` gives lowerings their milliseconds, 5 where none is given.

    Returns the contests that were held: the names of the lowerings and what each one computed.
    """
    monkeypatch.setenv("FLASHSVD_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(contest, "MAX_TIMES_AS_LONG", 1e9)  # sizes are tiny
    contests = []

    def put(**milliseconds):
        def told(runs, device, rounds):
            contests.append({name: run() for name, run in runs.items()})
            return {name: milliseconds.get(name, 5.0) for name in runs}

        monkeypatch.setattr(race, "median_ms", told)
        return contests

    return put


def lowerings(inner, *args, **options):
    """By kind, with where the seconds are from."""
    found = fsc.explain(inner, *args, options=AUTOTUNE | options)
    return {
        s.kind: (s.lowering, s.plan.known_from)
        for s in found.sites
        if s.kind in ("attention", "feed_forward")
    }


def compiled(inner, **options):
    torch._dynamo.reset()
    return torch.compile(inner, backend="flashsvd", options=AUTOTUNE | options)


WINNERS = [
    ({"unfused": 1.0}, {"attention": "unfused", "feed_forward": "unfused"}),
    (
        {"rank_space": 1.0, "row_blocks": 1.0},
        {"attention": "rank_space", "feed_forward": "row_blocks"},
    ),
    ({"row_blocks": 1.0, "unfused": 4.0}, {"attention": "unfused", "feed_forward": "row_blocks"}),
]


@pytest.mark.parametrize(("milliseconds", "expected"), WINNERS, ids=str)
def test_the_fastest_runs_and_is_right(milliseconds, expected, clock):
    contests = clock(**milliseconds)
    inner, x = model(), torch.randn(2, 37, HIDDEN)
    assert {known for _, known in lowerings(inner, x).values()} == {"predicted"}
    assert contests == []  # explaining times nothing
    assert_as_good_as_eager(inner, compiled(inner), (x,))
    assert [set(one) for one in contests] == [
        {"rank_space", "unfused"},
        {"row_blocks", "unfused"},
    ]  # once for both layers
    found = lowerings(inner, x)
    assert {kind: lowering for kind, (lowering, _) in found.items()} == expected
    assert {known for _, known in found.values()} == {"measured before"}
    (graph,) = fsc.explain(inner, x, options=AUTOTUNE).graphs
    for name in ("rank_space_attention", "row_blocks_feed_forward"):
        assert (name in graph.after) == any(name.startswith(how) for how in expected.values())


def test_what_is_timed_computes_the_same(clock):
    contests = clock()
    compiled(model())(torch.randn(3, 29, HIDDEN))
    for one in contests:
        (expected,), *others = one.values()
        assert expected.isfinite().all()
        assert expected.norm() > 0
        for (other,) in others:
            torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_timed_twice(clock):
    contests = clock(unfused=1.0)
    x = torch.randn(2, 37, HIDDEN)
    compiled(model())(x)
    count = len(contests)
    compiled(model(4))(x)  # others' weights, more layers
    race._known.clear()  # another process
    compiled(model())(x)
    assert len(contests) == count
    compiled(model())(torch.randn(2, 38, HIDDEN))
    assert len(contests) == 2 * count


def test_what_is_kept_and_cut_off_is_measured_anew(clock, tmp_path):
    contests = clock()
    x = torch.randn(2, 37, HIDDEN)
    compiled(model())(x)
    count = len(contests)
    for path in (tmp_path / "lowerings").glob("*.json"):
        ms = json.loads(path.read_text())["ms"]
        assert len(ms) == 2
        path.write_text(path.read_text()[:-40])
    race._known.clear()
    compiled(model())(x)
    assert len(contests) == 2 * count


@pytest.mark.parametrize("options", [{"max_autotune": True}, {"autotune": True}], ids=str)
@pytest.mark.parametrize("switched_off", [False, True])
def test_only_where_it_is_asked(options, switched_off, clock):
    contests = clock()
    given = {"compiler": "eager", "autotune": "auto"}
    given |= {"autotune": False} if switched_off else options
    torch._dynamo.reset()
    torch.compile(model(1), backend="flashsvd", options=given)(torch.randn(2, 37, HIDDEN))
    assert bool(contests) != switched_off


def test_by_default_nothing_is_timed(clock):
    contests = clock()
    compiled(model(1), autotune="auto")(torch.randn(2, 37, HIDDEN))
    assert contests == []


def test_what_is_forced_is_not_timed(clock):
    contests = clock(unfused=1.0)
    inner, x = model(1), torch.randn(2, 37, HIDDEN)
    forced = {"attention": "rank_space", "feed_forward": "row_blocks"}
    compiled(inner, **forced)(x)
    assert contests == []
    assert {lowering for lowering, _ in lowerings(inner, x, **forced).values()} == {
        "rank_space",
        "row_blocks",
    }


def test_what_is_far_from_the_best_is_not_timed(clock, monkeypatch):
    contests = clock()
    monkeypatch.setattr(contest, "MAX_TIMES_AS_LONG", 1.0)
    compiled(model(1))(torch.randn(2, 37, HIDDEN))
    assert contests == []


def test_training_is_not_timed(clock):
    contests = clock()
    with torch.enable_grad():
        inner, x = model(1), torch.randn(2, 37, HIDDEN)
        run = compiled(inner, compiler="aot_eager")
        torch.testing.assert_close(run(x), inner(x), rtol=1e-4, atol=1e-4)
    assert contests == []


def test_near_ties_stay_as_planned(clock):
    inner, x = model(1), torch.randn(2, 37, HIDDEN)
    planned = {kind: lowering for kind, (lowering, _) in lowerings(inner, x).items()}
    others = {"rank_space", "row_blocks", "unfused"} - set(planned.values())
    clock(**dict.fromkeys(planned.values(), 1.02), **dict.fromkeys(others, 1.0))
    compiled(inner)(x)
    found = lowerings(inner, x)
    assert {kind: lowering for kind, (lowering, _) in found.items()} == planned
    assert {known for _, known in found.values()} == {"measured before"}


@pytest.mark.parametrize("when", ["compiled", "run"])
def test_what_does_not_run_is_dropped(when, clock, monkeypatch, caplog):
    clock(rank_space=1.0, row_blocks=1.0)
    inner, x = model(1), torch.randn(8, 512, HIDDEN)
    assert lowerings(inner, x)["attention"] == ("rank_space", "predicted")
    measured = race._measured

    def failing(fragments, device, compiled):
        def picky(module, inputs):
            if "flashsvd" not in module.code:
                return compiled(module, inputs)
            if when == "compiled":
                raise RuntimeError("out of resource")

            def fails(*_):
                raise RuntimeError("out of resource")

            return fails

        return measured(fragments, device, picky)

    monkeypatch.setattr(race, "_measured", failing)
    with caplog.at_level(logging.INFO, LOGGER):
        assert_as_good_as_eager(inner, compiled(inner), (x,))
    assert "rank_space does not run here: out of resource" in caplog.text
    assert {lowering for lowering, _ in lowerings(inner, x).values()} == {"unfused"}


@pytest.mark.parametrize("wrong", [2.0, float("nan")], ids=str)
def test_what_is_wrong_is_dropped(wrong, clock, monkeypatch, caplog):
    clock(rank_space=1.0, row_blocks=1.0)
    inner, x = model(1), torch.randn(2, 37, HIDDEN)
    measured = race._measured

    def lying(fragments, device, compiled):
        def run(module, inputs):
            factor = wrong if "flashsvd" in module.code else 1.0
            return lambda *given: [out * factor for out in compiled(module, inputs)(*given)]

        return measured(fragments, device, run)

    monkeypatch.setattr(race, "_measured", lying)
    with caplog.at_level(logging.WARNING, LOGGER):
        assert_as_good_as_eager(inner, compiled(inner), (x,))
    assert "rank_space is wrong here and was dropped" in caplog.text
    assert {lowering for lowering, _ in lowerings(inner, x).values()} == {"unfused"}


def test_lengths_that_are_symbols_count_at_the_example(clock):
    contests = clock(unfused=9.0)
    inner, x = model(1), torch.randn(2, 37, HIDDEN)
    torch._dynamo.mark_dynamic(x, 1)
    run = compiled(inner)
    run(x)
    assert all(37 in out.shape for one in contests for (out,) in one.values())
    count = len(contests)
    assert_as_good_as_eager(inner, run, (torch.randn(2, 61, HIDDEN),))
    assert len(contests) == count


def test_masks_are_a_part_of_it(clock):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Layer()

        def forward(self, x, keep):
            return self.layer(x, keep[:, None, None, :])

    contests = clock(rank_space=1.0)
    inner, x = Masked(), torch.randn(2, 37, HIDDEN)
    keep = torch.ones(2, 37, dtype=torch.bool)
    keep[1, 20:] = False
    assert_as_good_as_eager(inner, compiled(inner), (x, keep))
    assert contests
    assert lowerings(inner, x, keep)["attention"] == ("rank_space", "measured before")


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_with_a_real_clock(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHSVD_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(contest, "MAX_TIMES_AS_LONG", 1e9)
    inner, x = model(1), torch.randn(2, 37, HIDDEN)
    state = torch.get_rng_state()
    run = compiled(inner, compiler=compiler)
    run(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert_as_good_as_eager(inner, run, (x,))
    found = fsc.explain(inner, x, options=AUTOTUNE | {"compiler": compiler})
    attention = next(s for s in found.sites if s.kind == "attention")
    assert attention.plan.known_from == "measured before"
    assert 0 < attention.plan.seconds < 1
    assert all(0 < r.seconds < 1 for r in attention.plan.rivals)
    assert "measured before" in str(found)
    assert found.totals.unfused_seconds > 0
