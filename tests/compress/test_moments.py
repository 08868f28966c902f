"""Calibration: sums over real tokens, gradients of what shall stay, and a model left as it was."""

import pytest
import torch
from torch import nn

from flashsvd_compile.compress.moments import Watched, collect

ALL = frozenset({"inputs", "outputs", "fisher"})


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4, bias=False)
        self.unused = nn.Linear(5, 3)

    def forward(self, x, attention_mask=None):
        return {"logits": self.second(self.first(x).tanh())}


def watched(model, rows=(2, 3), wants=ALL):
    return [
        Watched(model.first, rows, wants),
        Watched(model.second, (4,), wants),
        Watched(model.unused, (3,), wants),
    ]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def batches(count=3, tokens=7):
    return [{"x": torch.randn(2, tokens + i, 5)} for i in range(count)]


def masked(batch):
    lengths = torch.tensor([[3], [5]])
    return batch | {"attention_mask": (torch.arange(batch["x"].shape[1]) < lengths).long()}


def test_inputs_of_real_tokens(model):
    given, seen = [masked(b) for b in batches()], watched(model)
    assert collect(model, seen, given, None, 0) == 3
    x = torch.cat([b["x"][b["attention_mask"].bool()] for b in given])
    assert seen[0].moments.tokens == len(x) == 3 * 8
    torch.testing.assert_close(seen[0].moments.inputs, x.T @ x)
    h = model.first(x).tanh()
    torch.testing.assert_close(seen[1].moments.inputs, (h.T @ h).detach())
    assert (seen[2].moments.tokens, seen[2].moments.outputs) == (0, None)


def test_gradients_of_a_loss(model):
    given, seen = batches(), watched(model)
    collect(model, seen, given, lambda out, batch: (out["logits"] - 1).square().sum(), 0)
    outputs, fisher = 0, 0
    for b in given:
        hidden = model.first(b["x"]).detach().requires_grad_()
        (model.second(hidden.tanh()) - 1).square().sum().backward()
        g = hidden.grad.flatten(0, 1)
        parts = g.unflatten(-1, (2, 3)).transpose(0, 1)
        outputs = outputs + parts.mT @ parts
        fisher = fisher + (g.T @ b["x"].flatten(0, 1)).square().sum(0)
    torch.testing.assert_close(seen[0].moments.outputs, outputs)
    torch.testing.assert_close(seen[0].moments.fisher, fisher)


def test_outputs_that_shall_stay_give_the_gauss_newton_metric(model):
    seen, x = watched(model, rows=(6,)), torch.randn(2, 7, 5)
    collect(model, seen, [{"x": x}] * 4000, lambda out, _: out["logits"].sum(1), 0)
    # d(sum of second(tanh h)) / dh = W₂ · diag(1 − tanh² h), for each token
    slope = 1 - model.first(x).tanh().square()
    jacobian = model.second.weight * slope.flatten(0, 1)[:, None]
    exact = (jacobian.mT @ jacobian).sum(0).detach()
    assert (seen[0].moments.outputs / 4000 - exact).norm() < 0.05 * exact.norm()


def test_the_same_seed_gives_the_same_moments(model):
    given, found = batches(), []
    for seed in (1, 1, 2):
        seen = watched(model)
        collect(model, seen, given, None, seed)
        found.append(seen[0].moments.outputs)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(model, fails):
    model.train()
    model.second.eval()
    model.first.bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}

    def given():
        yield batches(1)[0]
        if fails:
            raise KeyboardInterrupt

    try:
        collect(model, watched(model), given(), None, 0)
    except KeyboardInterrupt:
        assert fails
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert (model.training, model.second.training) == (True, False)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_frozen_model_has_gradients_all_the_same(model):
    model.requires_grad_(False)
    seen = watched(model)
    collect(model, seen, batches(), None, 0)
    assert seen[0].moments.outputs.any()


def test_no_batch_is_an_error(model):
    with pytest.raises(ValueError, match="no batch"):
        collect(model, watched(model), [], None, 0)


def test_an_output_without_numbers_is_an_error(model):
    with pytest.raises(ValueError, match="pass a loss"):
        collect(nn.Sequential(model.first, Nothing()), watched(model)[:1],
                [torch.randn(2, 3, 5)], None, 0)  # fmt: skip


class Nothing(nn.Module):
    def forward(self, x):
        return "nothing"
