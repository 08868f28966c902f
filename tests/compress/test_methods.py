"""`compress_` with calibration: each method is best at what it minimises; nothing unseen is cut."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2Model

from flashsvd_compile import compress_
from flashsvd_compile.compress import methods
from flashsvd_compile.compress.modules import LowRankLinear

CALIBRATED = ["fwsvd", "whitened", "planned"]


class Block(nn.Module):
    """Two linears, of which the second reads few directions, and one that nobody calls."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 20)
        self.unused = nn.Linear(24, 24)

    def forward(self, x):
        return self.down(self.up(x).relu())


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block()


def batches(count=6):
    """Inputs of unequal directions."""
    generator = torch.Generator().manual_seed(1)
    scale = 4.0 ** -torch.arange(24.0).div(4)
    return [torch.randn(5, 7, 24, generator=generator) * scale for _ in range(count)]


def off(model, other, given):
    return float(sum((model(x) - other(x)).square().sum() for x in given))


def compressed(model, given=None, **kwargs):
    made = copy.deepcopy(model)
    return made, compress_(made, calibration=given, **kwargs)


@torch.no_grad()
def test_whitened_errs_least_at_the_output_of_a_layer(block):
    given = batches()
    made, report = compressed(block, given, keep=0.4, method="whitened", include=["up"])
    plain, _ = compressed(block, keep=0.4, include=["up"])
    assert report.method == made.up.method == "whitened"
    assert made.up.rank == plain.up.rank
    x = torch.cat([b.flatten(0, 1) for b in given])
    errors = [(block.up(x) - other.up(x)).square().sum() for other in (made, plain)]
    # The best of its rank: the truncated SVD of W H^½ (Eckart–Young).
    whole = (x @ block.up.weight.T).double()
    best = torch.linalg.svdvals(whole)[made.up.rank :].square().sum()
    assert errors[0] == pytest.approx(float(best), rel=1e-2)
    assert errors[0] < 0.5 * errors[1]


class Narrowing(Block):
    """Of what its layers make only three directions are read."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(20, 3)

    def forward(self, x):
        return self.read(super().forward(x))


@torch.no_grad()
def test_planned_loses_least_at_the_end():
    torch.manual_seed(0)
    model, given = Narrowing(), batches()
    losses = {}
    for method in ("svd", *CALIBRATED):
        made, report = compressed(
            model, None if method == "svd" else given, keep=0.4, method=method,
            include=["up", "down"],
        )  # fmt: skip
        taken = [r for r in report.rows if not r.reason.startswith("not")]
        used = sum(r.bytes_after for r in taken)
        assert used <= 0.4 * sum(r.bytes_before for r in taken)
        losses[method] = off(model, made, given)
    assert losses["planned"] < 0.6 * losses["whitened"] < losses["svd"]


def test_planned_is_the_default_with_calibration(block):
    assert compressed(block, batches())[1].method == "planned"
    assert compressed(block)[1].method == "svd"


def test_shares_of_the_loss_are_told(block):
    _, report = compressed(block, batches(), keep=0.4, exclude=["unused"])
    assert all(row.loss > 0 for row in report.rows if row.kind != "dense")
    shares = [float(line.split()[-1].rstrip("%")) for line in str(report).splitlines()
              if line.startswith(("up", "down"))]  # fmt: skip
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert "factored by planned at keep=0.4" in str(report)


@pytest.mark.parametrize("method", CALIBRATED)
def test_what_calibration_does_not_reach_stays(block, method):
    made, report = compressed(block, batches(), method=method)
    row = next(row for row in report.rows if row.path == "unused")
    assert (row.kind, row.reason) == ("dense", "calibration did not reach it")
    assert torch.equal(made.unused.weight, block.unused.weight)
    assert isinstance(made.up, LowRankLinear)


@pytest.mark.parametrize("method", ["fwsvd", "planned"])
def test_what_the_loss_does_not_depend_on_stays(method):
    class Both(Block):
        def forward(self, x):
            return super().forward(x), self.unused(x)

    _, report = compressed(Both(), batches(), method=method, loss=lambda out, _: out[0])
    row = next(row for row in report.rows if row.path == "unused")
    assert (row.kind, row.reason) == ("dense", "the loss does not depend on it")


def test_too_many_outputs_for_a_metric_stay(block, monkeypatch):
    monkeypatch.setattr(methods, "MAX_OUTPUTS", 30)
    _, report = compressed(block, batches())
    assert "its 40 outputs are more than the 30" in report.rows[0].reason


@pytest.mark.parametrize("budget", [0.5, 0.8])
@pytest.mark.parametrize("method", ["svd", "planned"])
def test_a_budget_of_bytes_holds_for_the_model(block, budget, method):
    whole = sum(p.numel() * 4 for p in block.parameters())
    given = None if method == "svd" else batches()
    made, report = compressed(block, given, weight_budget=int(budget * whole), method=method)
    assert report.model_bytes_after <= budget * whole
    assert report.model_bytes_after > (budget - 0.15) * whole
    assert report.model_bytes_after == sum(p.numel() * 4 for p in made.parameters())


def test_padding_does_not_count():
    torch.manual_seed(0)
    model = BertForSequenceClassification(small_bert()).eval()
    ids = torch.randint(0, 50, (4, 9))
    mask = (torch.arange(9) < torch.tensor([[3], [9], [5], [7]])).long()
    other = torch.where(mask.bool(), ids, torch.full_like(ids, 7))  # another padding
    made = [
        compressed(model, [{"input_ids": x, "attention_mask": mask}], include=["*layer*"])[0]
        for x in (ids, other)
    ]
    for one, two in zip(*(m.state_dict().values() for m in made), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def small_bert():
    return BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=50, max_position_embeddings=16,
    )  # fmt: skip


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("labels", [False, True])
def test_a_transformer_with_and_without_labels(method, labels):
    torch.manual_seed(0)
    model = BertForSequenceClassification(small_bert()).train().requires_grad_(False)
    batch = {"input_ids": torch.randint(0, 50, (4, 9))}
    if labels:
        batch["labels"] = torch.tensor([0, 1, 1, 0])
    made, report = compressed(model, [batch] * 2, method=method, keep=0.6, include=["*layer*"])
    assert any(row.kind == "per_head" for row in report.rows)
    assert made.training
    assert all(math.isfinite(row.error) for row in report.rows)
    assert made.eval()(batch["input_ids"]).logits.isfinite().all()


def test_fused_projections_in_half_precision():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, n_positions=16)
    model = GPT2Model(config).bfloat16()
    made, report = compressed(model, [torch.randint(0, 50, (3, 8))], keep=0.6)
    assert {row.kind for row in report.rows} >= {"per_head"}
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert made(torch.randint(0, 50, (3, 8)))[0].isfinite().all()


def test_the_same_seed_gives_the_same_factors(block):
    made = [compressed(block, batches(), seed=3)[0].state_dict() for _ in range(2)]
    assert all(torch.equal(one, two) for one, two in zip(*(m.values() for m in made), strict=True))


WRONG = [
    ({"method": "planed"}, "the nearest is 'planned' (allowed: svd, fwsvd, whitened, planned)"),
    ({"method": "whitened", "calibration": None}, "needs calibration"),
    ({"method": "svd"}, "looks at no data"),
    ({"calibration": []}, "no batch"),
    ({"keep": 0.5, "weight_budget": 10**6}, "give one"),
    ({"weight_budget": "1 KiB"}, "what stays dense takes"),
    ({"weight_budget": "1 KQB"}, "no unit 'KQB'; the nearest is"),
    ({"keep": 0.001}, "the smallest ranks take"),
    ({"calibration": [torch.full((2, 3, 24), float("nan"))]}, "not finite"),
]


@pytest.mark.parametrize(("given", "told"), WRONG, ids=str)
def test_an_error_leaves_the_model_as_it_was(block, given, told):
    modules = dict(block.named_modules())
    state = {name: p.clone() for name, p in block.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError)) as error:
        compress_(block, **{"calibration": batches()} | given)
    assert told in str(error.value)
    assert dict(block.named_modules()) == modules
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())
