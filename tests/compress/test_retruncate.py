"""`retruncate_` cuts factors to the best ones of a smaller rank, and an optimizer follows."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

import flashsvd_compile as fsc
from flashsvd_compile.compress import retruncating
from flashsvd_compile.compress.joint_modules import NarrowHeadsLinear, NarrowInputLinear
from flashsvd_compile.compress.modules import (
    FusedPerHeadLowRankLinear,
    LowRankLinear,
    PerHeadLowRankLinear,
)

F64 = torch.float64
LAYERS = {
    "matrix": lambda **kw: LowRankLinear(24, 40, 10, **kw),
    "per_head": lambda **kw: PerHeadLowRankLinear(24, 3, 12, 10, **kw),
    "fused": lambda **kw: FusedPerHeadLowRankLinear(24, 3, 2, 12, 10, **kw),
}
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96,
}  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def holding(layer):
    return nn.ModuleDict({"a": layer})


def token_batches(count=4, rows=8, length=12):
    masks = torch.arange(length) < torch.randint(4, length + 1, (rows, 1))
    return [
        {"input_ids": torch.randint(50, (rows, length)), "attention_mask": masks.long()}
        for _ in range(count)
    ]


def narrow_bert(keep=0.4, **kw):
    """Whose heads are narrowed on both sides."""
    model = BertModel(BertConfig(**SIZES, vocab_size=50), add_pooling_layer=False).eval()
    batches = token_batches()
    fsc.compress_(model, keep=keep, calibration=batches)
    kinds = {type(m) for m in model.modules()}
    assert {NarrowHeadsLinear, NarrowInputLinear, LowRankLinear} <= kinds
    return model.to(**kw), batches


def truncated(matrix, rank):
    q, sigma, z = torch.linalg.svd(matrix, full_matrices=False)
    return q[..., :rank] * sigma[..., None, :rank] @ z[..., :rank, :]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_plain_cut_is_the_best_of_its_rank(name, bias):
    model = holding(LAYERS[name](bias=bias, dtype=F64))
    layer = model["a"]
    product, kept_bias = layer.v.detach() @ layer.u.detach(), layer.bias
    (row,) = fsc.retruncate_(model, keep=0.6).rows
    assert (row.rank_before, row.rank, layer.rank) == (10, 6, 6)
    assert model["a"] is layer
    assert layer.bias is kept_bias
    torch.testing.assert_close(layer.v @ layer.u, truncated(product, 6))
    # Balanced: each component as long in both.
    torch.testing.assert_close(layer.u.norm(dim=-1), layer.v.norm(dim=-2))
    gap = (product - truncated(product, 6)).norm() / product.norm()
    assert row.error == pytest.approx(float(gap))
    assert row.bytes_after == (layer.u.numel() + layer.v.numel()) * 8
    assert layer(torch.randn(2, 5, 24, dtype=F64)).shape == (2, 5, layer.out_features)


def test_narrowed_heads_are_cut_on_both_sides():
    model, _ = narrow_bert(dtype=F64)
    pairs = []
    for layer in model.encoder.layer:
        one = layer.attention
        pairs += [(one.self.query, one.self.key), (one.self.value, one.output.dense)]
    before = [sides(*pair) for pair in pairs]
    report = fsc.retruncate_(model, keep=0.5)
    assert [row.is_cut for row in report.rows] == [row.rank_before > 1 for row in report.rows]
    checked = 0
    for pair, (a, b) in zip(pairs, before, strict=True):
        if not isinstance(pair[0], NarrowHeadsLinear):
            continue
        first, second = sides(*pair)
        rank = pair[0].rank
        assert rank == pair[1].rank == first.shape[-2] == max(1, a.shape[-2] // 2)
        torch.testing.assert_close(first.mT @ second, truncated(a.mT @ b, rank))
        checked += 1
    assert checked
    kinds = [m for m in model.modules() if isinstance(m, NarrowHeadsLinear)]
    assert all(m.lift.shape == (m.head_dim, m.rank) for m in kinds)


def sides(first, second):
    """[H, r, k] of what writes a pair's latents and what reads them; copies."""
    if not isinstance(first, NarrowHeadsLinear):
        return None, None
    a = torch.cat([first.weight, first.bias.view(first.num_heads, -1, 1)], -1)
    if isinstance(second, NarrowInputLinear):
        return a.detach().clone(), second.weight.permute(1, 2, 0).detach().clone()
    b = torch.cat([second.weight, second.bias.view(second.num_heads, -1, 1)], -1)
    return a.detach().clone(), b.detach().clone()


def test_calibration_plans_and_loses_less():
    model, batches = narrow_bert()
    plain = copy.deepcopy(model)
    with torch.no_grad():
        expected = [model(**b).last_hidden_state[b["attention_mask"].bool()] for b in batches]
    report = fsc.retruncate_(model, keep=0.6, calibration=batches)
    fsc.retruncate_(plain, keep=0.6)

    @torch.no_grad()
    def off(changed):
        got = [changed(**b).last_hidden_state[b["attention_mask"].bool()] for b in batches]
        return sum((x - y).square().sum() for x, y in zip(got, expected, strict=True))

    assert off(model) < off(plain)
    before = sum(row.bytes_before for row in report.rows)
    assert sum(row.bytes_after for row in report.rows) <= 0.6 * before
    assert report.method == "planned"
    assert any(row.loss for row in report.rows)
    json.dumps(report.to_dict())
    assert "low-rank layers cut by planned" in str(report)
    assert all(p.requires_grad for p in model.parameters())


def test_in_the_metric_it_is_the_best():
    """Of one layer whose loss is the sum over outputs G, inputs H: against the dense optimum."""
    model = nn.Sequential(LowRankLinear(24, 40, 16, bias=False), nn.Linear(40, 30)).double()
    data = [(torch.randn(300, 24, dtype=F64) * torch.logspace(0, -1, 24, dtype=F64),)]
    layer = model[0]
    product = (layer.v @ layer.u).detach()
    fsc.retruncate_(model, keep=0.5, calibration=data)
    h = data[0][0].T @ data[0][0] / 300
    g = model[1].weight.detach().T @ model[1].weight.detach()  # random directions estimate it
    root_h = torch.linalg.cholesky(h)
    root_g = torch.linalg.cholesky(g + 1e-4 * g.diagonal().mean() * torch.eye(40, dtype=F64))

    def off(changed):
        return (root_g.T @ (changed - product) @ root_h).norm()

    best = root_g.T @ product @ root_h
    least = (truncated(best, layer.rank) - best).norm()
    assert layer.rank == 8
    assert least <= off((layer.v @ layer.u).detach()) < 1.1 * least
    assert off(truncated(product, 8)) > 1.2 * least


def test_a_budget_of_bytes_is_kept():
    model, _ = narrow_bert()
    whole = sum(p.numel() * 4 for p in model.parameters())
    report = fsc.retruncate_(model, weight_budget=whole - 8000)
    assert sum(p.numel() * 4 for p in model.parameters()) == report.model_bytes_after
    assert report.model_bytes_after <= whole - 8000
    assert 0 < report.keep < 1


# ---- optimizers ----------------------------------------------------------------------------------


def step(model, optimizer, batches, direction):
    for batch in batches:
        output = model(**batch).last_hidden_state
        (output * direction).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, momentum=0.5),
        lambda p: torch.optim.Rprop(p),  # whose state has no meaning in other bases
    ],
)
@pytest.mark.parametrize("calibrated", [True, False])
def test_training_goes_on(make, calibrated):
    model, batches = narrow_bert()
    direction = torch.randn(32)
    optimizer = make([{"params": list(model.parameters())}])
    step(model, optimizer, batches, direction)
    old = set(model.parameters())
    fsc.retruncate_(
        model, keep=0.5, optimizer=optimizer, calibration=batches if calibrated else None
    )
    (group,) = optimizer.param_groups
    assert set(group["params"]) == set(model.parameters())
    gone = old - set(model.parameters())
    assert gone
    assert not gone & set(optimizer.state)
    for parameter, state in optimizer.state.items():
        shapes = {v.shape for v in state.values() if isinstance(v, torch.Tensor) and v.dim()}
        assert shapes <= {parameter.shape}
    before = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer, batches, direction)
    for parameter, was in zip(model.parameters(), before, strict=True):
        assert torch.isfinite(parameter).all()
        assert not torch.equal(parameter, was) or not parameter.grad_fn


@pytest.mark.parametrize("name", LAYERS)
def test_momentum_is_that_of_the_new_factors(name):
    """A loss that is linear in the product has one gradient there, whatever the factors: where the
    cut loses nothing, momentum is what the new factors' own gradient would have made it."""
    layer = LAYERS[name](bias=False, dtype=F64)
    with torch.no_grad():  # of rank 6 in truth
        layer.u[..., 6:, :] = layer.u[..., :4, :]
    direction = torch.randn(layer.v.shape[:-1] + layer.u.shape[-1:], dtype=F64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
    ((layer.v @ layer.u) * direction).sum().backward()
    optimizer.step()
    fsc.retruncate_(holding(layer), keep=0.6, optimizer=optimizer)
    ((layer.v @ layer.u) * direction).sum().backward()
    for parameter in layer.parameters():
        torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], parameter.grad)


def test_squares_stay_positive_and_steps_are_kept():
    model, batches = narrow_bert()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, batches, torch.randn(32))
    fsc.retruncate_(model, keep=0.5, optimizer=optimizer)
    assert all((s["exp_avg_sq"] >= 0).all() for s in optimizer.state.values())
    assert {float(s["step"]) for s in optimizer.state.values()} == {4.0}


def test_flags_types_and_ties_are_kept():
    one, other = LAYERS["matrix"](dtype=torch.bfloat16), LAYERS["matrix"](dtype=torch.bfloat16)
    other.bias = one.bias
    one.u.requires_grad_(False)
    fsc.retruncate_(nn.ModuleList([one, other]), keep=0.5)
    assert other.bias is one.bias
    assert (one.u.requires_grad, one.v.requires_grad) == (False, True)
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16}


# ---- near misses ---------------------------------------------------------------------------------


def test_shared_factors_stay():
    one, other = LAYERS["matrix"](), LAYERS["matrix"]()
    other.u = one.u
    report = fsc.retruncate_(nn.ModuleList([one, other, LAYERS["matrix"]()]), keep=0.5)
    assert [row.is_cut for row in report.rows] == [False, False, True]
    assert "its u is shared with" in report.rows[0].reason


def test_one_side_of_heads_is_not_cut_alone():
    model, _ = narrow_bert()
    kinds = {path: type(module) for path, module in model.named_modules()}
    path = next(p for p, kind in kinds.items() if kind is NarrowInputLinear)
    value = path.replace("output.dense", "self.value")
    report = fsc.retruncate_(model, keep=0.5, exclude=[path])
    rows = {row.path: row for row in report.rows}
    assert rows[path].reason == "excluded"
    assert rows[value].reason == "the other side of its heads is excluded"


BAD = [
    ({}, ValueError, "give keep or weight_budget"),
    ({"keep": 0.5, "weight_budget": 10}, ValueError, "give keep or weight_budget"),
    ({"keep": 1}, ValueError, r"keep must be in \(0, 1\)"),
    ({"keep": 0.0}, ValueError, r"keep must be in \(0, 1\)"),
    ({"keep": "half"}, TypeError, "keep must be a number"),
    ({"keep": True}, TypeError, "keep must be a number"),
    ({"weight_budget": 1}, ValueError, "smallest ranks|takes"),
    ({"keep": 0.5, "include": ["b"]}, ValueError, "'b' matches no linear layer.*nearest is 'a'"),
    ({"keep": 0.5, "optimizer": 3}, TypeError, "optimizer must be"),
    ({"keep": 0.5, "loss": len}, ValueError, "loss is that of calibration"),
    ({"keep": 0.5, "calibration": []}, ValueError, "calibration holds no batch"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_arguments(arguments, error, message):
    model = holding(LAYERS["matrix"]())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        fsc.retruncate_(model, **arguments)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_bad_models():
    with pytest.raises(ValueError, match="holds no low-rank layer"):
        fsc.retruncate_(nn.Sequential(nn.Linear(3, 3)), keep=0.5)
    layer = LAYERS["matrix"]()
    with torch.no_grad():
        layer.u[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        fsc.retruncate_(holding(layer), keep=0.5)
    with pytest.raises(ValueError, match="meta device"):
        fsc.retruncate_(holding(LAYERS["matrix"](device="meta")), keep=0.5)


def test_an_interrupt_leaves_the_model_and_its_optimizer(monkeypatch):
    model = nn.ModuleList([LAYERS["matrix"](), LAYERS["per_head"]()])
    optimizer = torch.optim.AdamW(model.parameters())
    held = list(model.parameters())
    cut, calls = retruncating._cut, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return cut(*args)

    monkeypatch.setattr(retruncating, "_cut", failing)
    with pytest.raises(KeyboardInterrupt):
        fsc.retruncate_(model, keep=0.5, optimizer=optimizer)
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
    assert all(a is b for a, b in zip(held, optimizer.param_groups[0]["params"], strict=True))
    assert model[0].rank == model[1].rank == 10


def test_what_was_compiled_is_compiled_again(fresh):
    model = nn.Sequential(LowRankLinear(24, 40, 10), nn.GELU(), LowRankLinear(40, 24, 10)).eval()
    fast = torch.compile(model, backend="flashsvd", options={"compiler": "eager"})
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        before = fast(x)
        fsc.retruncate_(fast, keep=0.4)
        assert model[0].rank == 4
        torch.testing.assert_close(fast(x), model(x))
        assert not torch.allclose(fast(x), before)


def test_vision_models_too():
    model = ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=4), add_pooling_layer=False)
    images = [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(2)]
    fsc.compress_(model, keep=0.7, calibration=images)
    report = fsc.retruncate_(model, keep=0.5, calibration=images)
    assert any(row.is_cut for row in report.rows)
    assert torch.isfinite(model(**images[0]).last_hidden_state).all()
