"""Blocks refined after the closed form: nearer to the dense model on what did not calibrate."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
)

import flashsvd_compile as fsc
from flashsvd_compile.compress import descent, refining
from flashsvd_compile.compress.blocks import find_blocks
from tests.compress.drawn import spread


def bert():
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        vocab_size=50,
    )  # fmt: skip
    return spread(BertModel(config, add_pooling_layer=False))


def t5():
    config = T5Config(d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=48, vocab_size=50)
    return spread(T5EncoderModel(config))


def tokens(count, rows=8, length=12):
    return [
        {"input_ids": torch.randint(0, 50, (rows, length)),
         "attention_mask": (torch.arange(length) < torch.randint(4, length, (rows, 1))).long()}
        for _ in range(count)
    ]  # fmt: skip


def pooled(output, batch):
    mask = batch["attention_mask"].unsqueeze(-1)
    return (output.last_hidden_state * mask).sum(1) / mask.sum(1)


def real(output, batch):
    return output.last_hidden_state[batch["attention_mask"].bool()]


def compressed(dense, batches, **options):
    model = copy.deepcopy(dense)
    options = {"keep": 0.5, "include": ["encoder.*"], "refine": True} | options
    fsc.compress_(model, calibration=batches, **options)
    return model


def closed_form(dense, batches, **options):
    return compressed(dense, refining.split(batches)[0], refine=False, **options)


@torch.no_grad()
def error(model, dense, batches, what=real):
    gaps = [what(model(**b), b) - what(dense(**b), b) for b in batches]
    return float(torch.cat([gap.flatten() for gap in gaps]).double().norm())


def same(first, second):
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def fast(monkeypatch):
    """Steps for models of this size."""
    monkeypatch.setattr(descent, "RATE", 1e-3)


def test_held_out_results_are_nearer(fast):
    dense, batches, held_out = bert(), tokens(15, 32), tokens(4, 32)
    before = closed_form(dense, batches, loss=pooled)
    after = compressed(dense, batches, loss=pooled)
    assert error(after, dense, held_out, pooled) < error(before, dense, held_out, pooled)


def test_results_that_judge_are_never_further():
    dense, batches = bert(), tokens(10)
    before, after = closed_form(dense, batches, keep=0.3), compressed(dense, batches, keep=0.3)

    def judged(model):
        found = [(b, error(model, dense, [b])) for b in refining.split(batches)[1]]
        return sum(gap**2 / int(b["attention_mask"].sum()) for b, gap in found)

    assert judged(after) <= judged(before) * (1 + 1e-5)


def test_blocks_that_pass_more_than_the_hidden_state_run():
    dense, batches, held_out = (
        t5(),
        tokens(60),
        tokens(8),
    )  # the first one makes a bias of positions
    before, after = (
        closed_form(dense, batches, loss=pooled),
        compressed(dense, batches, loss=pooled),
    )
    assert error(after, dense, held_out, pooled) < error(before, dense, held_out, pooled)


def test_the_seed_says_all(fast):
    dense, batches = bert(), tokens(6)
    first, second, other = (
        compressed(dense, batches, loss=pooled, seed=seed) for seed in (3, 3, 4)
    )
    assert same(first, second)
    assert not same(first, other)


def test_padding_does_not_count(fast):
    dense, batches = bert(), tokens(6)
    changed = [
        b | {"input_ids": b["input_ids"].where(b["attention_mask"].bool(), 7)} for b in batches
    ]
    pairs = [compressed(dense, given, loss=pooled).parameters() for given in (batches, changed)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_the_last_block_is_first(monkeypatch, fast):
    sizes, descend = [], refining.descend

    def seen(parameters, off, trains, judges, seed):
        sizes.append(seed)
        return descend(parameters, off, trains, judges, seed)

    monkeypatch.setattr(refining, "descend", seen)
    compressed(bert(), tokens(15, 32), loss=pooled)
    assert sizes == [1, 0]


def test_flags_and_gradients_are_as_before():
    dense, batches = bert().train(), tokens(5)
    for name, p in dense.named_parameters():
        p.requires_grad_("layer.1" in name)
    dense.embeddings.word_embeddings.weight.grad = mine = torch.ones(50, 32)
    dense_before = copy.deepcopy(dense.state_dict())
    model = copy.deepcopy(dense)
    model.embeddings.word_embeddings.weight.grad = mine
    with torch.no_grad():
        fsc.compress_(model, 0.5, include=["encoder.*"], calibration=batches, refine=True)
    for name, p in model.named_parameters():
        assert p.requires_grad == ("layer.1" in name), name
        if "word_embeddings" in name:
            assert p.grad is mine
        else:
            assert p.grad is None
        if name in dense_before and "dense" not in name and "self" not in name:
            assert torch.equal(p, dense_before[name]), name
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch):
    dense, batches = bert(), tokens(5)
    model, calls = copy.deepcopy(dense), []
    step = torch.optim.Adam.step

    def interrupted(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fsc.compress_(model, include=["encoder.*"], calibration=batches, refine=True)
    before, after = dense.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert same(dense, model)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_gets_worse_keeps_its_closed_form(monkeypatch):
    monkeypatch.setattr(descent, "RATE", 10.0)
    dense, batches = bert(), tokens(6)
    assert same(closed_form(dense, batches), compressed(dense, batches))


def test_the_closed_form_never_sees_what_judges():
    batches = list(range(12))
    trains, judges = refining.split(batches)
    assert judges == [2, 7]
    assert sorted(trains + judges) == batches
    assert refining.split([0, 1]) == ([0], [1])
    with pytest.raises(ValueError, match="two batches"):
        refining.split([0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, fast):
    dense, batches = bert().to(dtype), tokens(15, 32)
    before, after = (
        closed_form(dense, batches, loss=pooled),
        compressed(dense, batches, loss=pooled),
    )
    assert {p.dtype for p in after.parameters()} == {dtype}
    assert not same(before, after)
    judges = refining.split(batches)[1]
    assert error(after, dense, judges, pooled) < error(before, dense, judges, pooled)


def test_descent_keeps_the_best_pass_and_all_else_as_it_was():
    """One batch pulls to 1, which judges for a while and no longer when it is past 0.3."""
    p = nn.Parameter(torch.full((4,), 0.2), requires_grad=False)
    passes = []

    def off(batch):
        if batch:
            passes.append(float(p[0]))
        return (p - (0.3 if batch else 1)).square().sum()

    old, descent.RATE = descent.RATE, 1.0
    try:
        judged = descent.descend([p], off, [0], [1], 0)
    finally:
        descent.RATE = old
    assert judged.after == min((p - 0.3).square().sum().item(), judged.before)
    assert float(p[0]) in [passes[0], *passes]
    assert not p.requires_grad
    assert p.grad is None


def test_blocks_in_front_are_skipped_only_where_nothing_else_comes_from_them():
    batches = tokens(2)
    for model, skips in ((bert(), True), (t5(), False)):
        paths = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        blocks = find_blocks(model, paths, batches)
        reading = refining._Reading(model, blocks, 1, batches, real)
        assert reading._skips == skips
        with torch.no_grad():
            hidden = blocks.run(0, 1, blocks.hidden[1])
            found, wanted = reading.results(1, hidden), real(model(**batches[1]), batches[1])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_without_blocks_it_says_so():
    model = nn.ModuleDict({"a": nn.Linear(16, 16)})
    model.forward = lambda x: model["a"](x)
    with pytest.raises(ValueError, match="no list of blocks"):
        fsc.compress_(model, keep=0.5, calibration=[torch.randn(8, 16)] * 2, refine=True)


@pytest.mark.parametrize("method", [None, "svd", "whitened"])
def test_other_methods_are_refused(method):
    given = {"calibration": tokens(2)} if method == "whitened" else {}
    with pytest.raises(ValueError, match="needs calibration"):
        fsc.compress_(bert(), method=method, refine=True, **given)


def test_where_batches_have_labels_what_comes_behind_the_loss_stays():
    config = LlamaConfig(
        hidden_size=24, num_attention_heads=3, num_key_value_heads=1, head_dim=8,
        num_hidden_layers=2, vocab_size=50, intermediate_size=40, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = [torch.randint(0, 50, (2, 7)) for _ in range(3)]
    labelled = [{"input_ids": x, "labels": x} for x in ids]
    report = fsc.compress_(model, keep=0.6, calibration=labelled, refine=True)
    assert any(row.rank for row in report.rows)
    results = refining._results_of(None)
    output = model(**labelled[0])
    assert results(output, labelled[0]).shape == (14, 50)
