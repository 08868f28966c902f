"""Blocks refined after the closed form: nearer to the dense model, the same with the same seed."""

import copy

import pytest
import torch
from transformers import BertConfig, BertModel

import flashsvd_compile as fsc
from flashsvd_compile.compress import refine


def bert():
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        vocab_size=50,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(std=2 * p.shape[1] ** -0.5)
            elif name.endswith("bias"):
                p.normal_(std=0.3)
    return model.eval()


def tokens(count):
    return [
        {"input_ids": torch.randint(0, 50, (8, 12)),
         "attention_mask": (torch.arange(12) < torch.randint(4, 12, (8, 1))).long()}
        for _ in range(count)
    ]  # fmt: skip


def pooled(output, batch):
    mask = batch["attention_mask"].unsqueeze(-1)
    return (output.last_hidden_state * mask).sum(1) / mask.sum(1)


def compressed(dense, batches, **options):
    model = copy.deepcopy(dense)
    fsc.compress_(model, keep=0.5, include=["encoder.*"], calibration=batches, **options)
    return model


@torch.no_grad()
def error(model, dense, batches, what):
    gaps = [what(model(**b), b) - what(dense(**b), b) for b in batches]
    return float(torch.cat([gap.flatten() for gap in gaps]).norm())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("loss", [None, pooled])
def test_held_out_results_are_nearer(loss):
    dense, batches, held_out = bert(), tokens(64), tokens(8)
    before = compressed(dense, batches, loss=loss)
    after = compressed(dense, batches, loss=loss, refine=True)
    mask = "attention_mask"
    what = loss or (lambda output, b: output.last_hidden_state[b[mask].bool()])
    assert error(after, dense, held_out, what) < error(before, dense, held_out, what)


def test_the_seed_says_all():
    dense, batches = bert(), tokens(4)
    first, second = (compressed(dense, batches, refine=True, seed=3) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_was_frozen_stays_so():
    dense, batches = bert().train(), tokens(4)
    for name, p in dense.named_parameters():
        p.requires_grad_("layer.1" in name)
    model = compressed(dense, batches, refine=True)
    for name, p in model.named_parameters():
        assert p.requires_grad == ("layer.1" in name), name
        assert p.grad is None
    assert all(module.training for module in model.modules())


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch):
    dense, batches = bert(), tokens(4)
    model, calls = copy.deepcopy(dense), []
    step = torch.optim.Adam.step

    def interrupted(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fsc.compress_(model, include=["encoder.*"], calibration=batches, refine=True)
    before, after = dense.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_block_that_gets_worse_keeps_its_closed_form(monkeypatch):
    monkeypatch.setattr(refine, "RATE", 10.0)
    dense, batches = bert(), tokens(4)
    plain, tried = compressed(dense, batches), compressed(dense, batches, refine=True)
    for a, b in zip(plain.parameters(), tried.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_blocks_it_says_so(caplog):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(16, 16)})
    model.forward = lambda x: model["a"](x)
    fsc.compress_(model, keep=0.5, calibration=[torch.randn(32, 16)], refine=True)
    assert "not refined" in caplog.text


@pytest.mark.parametrize("method", ["svd", "whitened"])
def test_other_methods_are_refused(method):
    given = {} if method == "svd" else {"calibration": tokens(1)}
    with pytest.raises(ValueError, match="planned"):
        fsc.compress_(bert(), method=method, refine=True, **given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_refused(dtype):
    with pytest.raises(ValueError, match=r"too coarse for, as encoder\.layer\.0"):
        fsc.compress_(bert().to(dtype), calibration=tokens(1), refine=True)
