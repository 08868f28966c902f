"""The example from end to end, far smaller: what it trains, factors, runs and prints is right."""

import copy
import math

import pytest
import torch
from torch import nn

import flashsvd_compile as fsc
from examples import agreement, causal, topics, training
from examples.agreement import DisagreementError, budget_of, check_logits, check_tokens
from examples.generating import Continuation, continued
from examples.training import LENGTH, perplexity, train, untrained
from flashsvd_compile.compress.linears import model_bytes
from tests.spelled import OPTIONS, no_pass_may_fail

TINY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
STEPS, ROWS, NEW = 150, 2, 6


@pytest.fixture(scope="module")
def parts():
    whole = topics.split()
    return topics.Split(whole.training, whole.calibration[: 8 * LENGTH], whole.held_out[:8192])


@pytest.fixture(scope="module")
def dense(parts) -> nn.Module:
    model = untrained("cpu", 0, **TINY)
    train(model, parts.training, STEPS, seed=0, rows=4)
    return model


@pytest.fixture(scope="module")
def models(dense, parts):
    return {"dense": dense, **causal.compressed(dense, parts.calibration, keep=0.5)}


def test_no_paragraph_is_in_two_parts():
    seen = [" ".join(p.split()) for t in topics.distinct_topics().values() for p in t.split("\n\n")]
    assert len(seen) == len(set(seen)) > 1000
    whole = topics.split()
    total = sum(map(len, (whole.training, whole.calibration, whole.held_out)))
    assert min(len(whole.calibration), len(whole.held_out)) > total / 20
    assert len(whole.training) > total / 2


def test_training_learns_more_than_how_often_each_byte_comes(dense, parts):
    counts = torch.bincount(parts.held_out, minlength=topics.VOCABULARY).double()
    shares = counts[counts > 0] / counts.sum()
    unigram = float(-(shares * shares.log()).sum())
    assert math.log(perplexity(dense, parts.held_out, 8, "cpu")) < unigram - 0.4


def test_planned_ranks_lose_less_than_plain_svd_at_equal_bytes(models, parts):
    dense, plain = models["dense"], models["svd"]
    planned = copy.deepcopy(dense)
    # Equal shares round ranks down: a budget is what both can be held to.
    budget = model_bytes(plain)
    calibration = topics.batches(parts.calibration, LENGTH, 8)
    fsc.compress_(planned, weight_budget=budget, calibration=calibration)
    assert 0.98 * budget < model_bytes(planned) <= budget < 0.8 * model_bytes(dense)
    exact, worst, best = (perplexity(m, parts.held_out, 8, "cpu") for m in (dense, plain, planned))
    assert best - exact < 0.7 * (worst - exact)


@pytest.mark.usefixtures("fresh_inference")
def test_ours_says_what_the_unfused_model_says(models, parts):
    model = models["planned"]
    prompts = topics.windows(parts.held_out, LENGTH)[:ROWS]
    sites = fsc.explain(model, input_ids=prompts, use_cache=False, options=OPTIONS).sites
    taken = [s.lowering for s in sites if s.kind in ("attention", "feed_forward")]
    assert taken == ["rank_space", "row_blocks"] * TINY["num_hidden_layers"]
    run = torch.compile(model, backend="flashsvd", options=OPTIONS, dynamic=False)
    with no_pass_may_fail():
        said = causal.agreed(model, run, prompts, NEW)
        got = continued(run, model.config, prompts, NEW)
    assert "rows that part" not in said
    assert torch.equal(got.tokens, continued(model, model.config, prompts, NEW).tokens)


@pytest.mark.usefixtures("fresh_inference")
def test_greedy_tokens_are_those_of_generate(models, parts):
    model, prompts = models["planned"], topics.windows(parts.held_out, LENGTH)[:ROWS]
    want = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW, do_sample=False
    )
    got = continued(model, model.config, prompts, NEW, room=2 * NEW)
    assert torch.equal(got.tokens, want[:, LENGTH:])


@pytest.mark.usefixtures("fresh_inference")
def test_what_eager_would_not_say_is_told(models, parts):
    model, prompts = models["planned"], topics.windows(parts.held_out, LENGTH)[:ROWS]
    eager = model(input_ids=prompts).logits
    exact = copy.deepcopy(model).double()(input_ids=prompts).logits
    budget = budget_of(eager, exact)
    check_logits(eager, eager, exact)
    for wrong in (eager + 2 * budget, eager * math.nan):
        with pytest.raises(DisagreementError, match="logits are off"):
            check_logits(wrong, eager, exact)
    want = continued(model, model.config, prompts, NEW)
    other = Continuation((want.tokens + 1) % topics.VOCABULARY, want.logits)
    with pytest.raises(DisagreementError, match="greedy token 0 of row 0"):
        check_tokens(other, want, budget)
    tied = Continuation(want.tokens, torch.zeros_like(want.logits))
    assert check_tokens(other, tied, budget) == ROWS


@pytest.fixture
def small(monkeypatch, fresh, parts):
    """The script's arguments for a model and texts that take no time."""
    monkeypatch.setattr(training, "SIZES", TINY | {"num_hidden_layers": 1})
    few = topics.Split(
        parts.training, parts.calibration[: 2 * LENGTH], parts.held_out[: 4 * LENGTH]
    )
    monkeypatch.setattr(causal, "split", lambda: few)
    return ["--steps", "3", "--rows", "2", "--new", "4", "--device", "cpu", "--compiler", "eager"]


def test_the_script_prints_its_table(small, tmp_path, capsys):
    with no_pass_may_fail():
        assert causal.main([*small, "--save", str(tmp_path / "kept")]) == 0
    printed = capsys.readouterr().out
    assert "ours agrees with eager" in printed
    (ours,) = (line for line in printed.splitlines() if line.startswith("planned, flashsvd"))
    assert len(ours.split()) == 6
    kept = fsc.from_pretrained(tmp_path / "kept")
    assert f"{sum(p.numel() * 4 for p in kept.parameters()) / 2**20:.2f}" in ours


def test_the_script_fails_where_ours_is_wrong(small, monkeypatch, capsys):
    monkeypatch.setattr(agreement, "EAGER_ERROR", -1.0)  # nothing is right enough
    assert causal.main([*small, "--untimed"]) == 1
    caught = capsys.readouterr()
    assert "ours is wrong: logits are off" in caught.err
    assert "perplexity" not in caught.out
