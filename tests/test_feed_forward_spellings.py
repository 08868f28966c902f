"""The same low-rank feed-forward in many spellings: one site each, as exact as eager."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.spelled import (
    HIDDEN,
    INTERMEDIATE,
    RANK,
    Spelled,
    assert_same_gradients,
    check,
    hidden_states,
    low_rank,
)

ONE_SITE = ["feed_forward row_blocks"]
SIZES = ((2, 5), (3, 8), (4, 11))


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


# ---- activations --------------------------------------------------------------------------------


def _gelu_by_erf(x):
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def _gelu_new(x):
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def _gelu_fast(x):
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608028654 * (1.0 + 0.044715 * x * x)))


def _squared_relu_by_product(x):
    positive = F.relu(x)
    return positive * positive


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_by_erf": _gelu_by_erf,
    "gelu_new": _gelu_new,
    "gelu_fast": _gelu_fast,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu_by_clamp": lambda x: x.clamp(min=0),
    "relu_by_maximum": lambda x: torch.maximum(x, torch.zeros((), dtype=x.dtype)),
    "relu_in_place": lambda x: F.relu(x, inplace=True),
    "relu_squared_pow": lambda x: F.relu(x).pow(2),
    "relu_squared_square": lambda x: torch.square(torch.relu(x)),
    "relu_squared_product": _squared_relu_by_product,
    "silu": F.silu,
    "silu_in_place": lambda x: F.silu(x, inplace=True),
    "silu_by_sigmoid": lambda x: x * torch.sigmoid(x),
    "silu_by_exp": lambda x: x / (1 + torch.exp(-x)),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "upcast": lambda x: F.silu(x.float()).type_as(x),
    "dropout_off": lambda x: F.dropout(F.gelu(x), 0.1, training=False),
    "dropout_in_place_off": lambda x: F.dropout(F.gelu(x), 0.1, training=False, inplace=True),
}  # fmt: skip


class FeedForward(nn.Module):
    def __init__(self, activation, up=None, down=None):
        super().__init__()
        self.up = up or low_rank(HIDDEN, INTERMEDIATE)
        self.down = down or low_rank(INTERMEDIATE, HIDDEN)
        self.activation = activation

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


@pytest.mark.parametrize("dynamic", [False, True], ids=("static", "dynamic"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dynamic, tmp_path):
    model = FeedForward(ACTIVATIONS[activation])
    calls = [(hidden_states(*size),) for size in (SIZES if dynamic else SIZES[:1])]
    check(model, *calls, into=tmp_path, found=[*ONE_SITE], dynamic=dynamic)


# ---- projections --------------------------------------------------------------------------------


def _raw(inputs, outputs):
    return Spelled(lambda self, x: (x @ self.u) @ self.v, u=(inputs, RANK), v=(RANK, outputs))


def _raw_bias(inputs, outputs):
    return Spelled(
        lambda self, x: torch.matmul(torch.matmul(x, self.u), self.v) + self.b,
        u=(inputs, RANK), v=(RANK, outputs), b=(outputs,),
    )  # fmt: skip


def _bias_everywhere(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, RANK), nn.Linear(RANK, outputs))


def _added_biases(inputs, outputs):
    return Spelled(
        lambda self, x: self.b1 + (F.linear(F.linear(x, self.v), self.u, self.b) + self.b2),
        u=(outputs, RANK), v=(RANK, inputs), b=(outputs,), b1=(1, 1, outputs), b2=(outputs,),
    )  # fmt: skip


def _conv1d(inputs, outputs):
    def forward(self, x):
        flat = x.view(-1, x.size(-1))
        latent = torch.addmm(self.b0, flat, self.u)
        return torch.addmm(self.b, latent, self.v).view(*x.shape[:-1], outputs)

    return Spelled(forward, u=(inputs, RANK), v=(RANK, outputs), b0=(RANK,), b=(outputs,))


def _weighted_addmm(inputs, outputs):
    def forward(self, x):
        flat = x.reshape(-1, x.size(-1))
        lifted = torch.addmm(self.b, flat @ self.u, self.v, beta=1, alpha=1.0)
        return lifted.unflatten(0, x.shape[:2])

    return Spelled(forward, u=(inputs, RANK), v=(RANK, outputs), b=(outputs,))


def _einsum(inputs, outputs):
    return Spelled(
        lambda self, x: torch.einsum("...r,or->...o", torch.einsum("...i,ri->...r", x, self.u),
                                     self.v) + self.b,
        u=(RANK, inputs), v=(outputs, RANK), b=(outputs,),
    )  # fmt: skip


def _three_operands(inputs, outputs):
    return Spelled(
        lambda self, x: torch.einsum("bmi,ir,ro->bmo", x, self.u, self.v),
        u=(inputs, RANK), v=(RANK, outputs),
    )  # fmt: skip


def _tensordot(inputs, outputs):
    return Spelled(
        lambda self, x: torch.tensordot(torch.tensordot(x, self.u, dims=1), self.v, dims=1),
        u=(inputs, RANK), v=(RANK, outputs),
    )  # fmt: skip


def _tokens_last(inputs, outputs):
    """Weights on the left, as a convolution over positions has them."""
    return Spelled(
        lambda self, x: (self.v @ (self.u @ x.transpose(1, 2))).transpose(1, 2),
        u=(RANK, inputs), v=(outputs, RANK),
    )  # fmt: skip


PROJECTIONS = {
    "sequential": low_rank,
    "raw": _raw,
    "raw_bias": _raw_bias,
    "bias_everywhere": _bias_everywhere,
    "added_biases": _added_biases,
    "conv1d": _conv1d,
    "addmm": _weighted_addmm,
    "einsum": _einsum,
    "three_operands": _three_operands,
    "tensordot": _tensordot,
    "tokens_last": _tokens_last,
    "dense": nn.Linear,
}


@pytest.mark.parametrize("dynamic", [False, True], ids=("static", "dynamic"))
@pytest.mark.parametrize("name", [name for name in PROJECTIONS if name != "dense"])
def test_projections(name, dynamic, tmp_path):
    spell = PROJECTIONS[name]
    model = FeedForward(F.gelu, spell(HIDDEN, INTERMEDIATE), spell(INTERMEDIATE, HIDDEN))
    calls = [(hidden_states(*size),) for size in (SIZES if dynamic else SIZES[:1])]
    sites = check(model, *calls, into=tmp_path, dynamic=dynamic)
    assert [s["lowering"] for s in sites if s["kind"] == "feed_forward"] == ["row_blocks"]


@pytest.mark.parametrize("dense", ["up", "down"])
def test_one_dense_projection(dense, tmp_path):
    kinds = {name: nn.Linear if name == dense else low_rank for name in ("up", "down")}
    model = FeedForward(
        F.gelu, kinds["up"](HIDDEN, INTERMEDIATE), kinds["down"](INTERMEDIATE, HIDDEN)
    )
    check(model, (hidden_states(),), into=tmp_path, found=[*ONE_SITE])


# ---- gates --------------------------------------------------------------------------------------


class Gated(nn.Module):
    """Gate and up as two projections."""

    def __init__(self, combine, gate=low_rank, up=low_rank, down=low_rank):
        super().__init__()
        self.gate, self.up = gate(HIDDEN, INTERMEDIATE), up(HIDDEN, INTERMEDIATE)
        self.down = down(INTERMEDIATE, HIDDEN)
        self.combine = combine

    def forward(self, x):
        return self.down(self.combine(self.gate(x), self.up(x)))


class FusedGate(nn.Module):
    """Gate and up from one projection, cut by ``cut``."""

    def __init__(self, cut, combine, fused=low_rank):
        super().__init__()
        self.gate_up = fused(HIDDEN, 2 * INTERMEDIATE)
        self.down = low_rank(INTERMEDIATE, HIDDEN)
        self.cut, self.combine = cut, combine

    def forward(self, x):
        return self.down(self.combine(*self.cut(self.gate_up(x))))


COMBINES = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "swiglu_up_first": lambda gate, up: up * F.silu(gate),
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "geglu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "reglu": lambda gate, up: F.relu(gate) * up,
    "glu": lambda gate, up: torch.sigmoid(gate) * up,
    "bilinear": lambda gate, up: gate * up,
    "upcast": lambda gate, up: (F.silu(gate.float()) * up.float()).to(up.dtype),
    "in_place": lambda gate, up: F.silu(gate, inplace=True).mul_(up),
}
CUTS = {
    "chunk": lambda x: x.chunk(2, dim=-1),
    "chunk_up_first": lambda x: reversed(x.chunk(2, dim=-1)),
    "slices": lambda x: (x[..., :INTERMEDIATE], x[..., INTERMEDIATE:]),
    "split": lambda x: torch.split(x, INTERMEDIATE, dim=2),
    "interleaved": lambda x: (x[..., ::2], x[..., 1::2]),
    "interleaved_view": lambda x: x.view(*x.shape[:2], INTERMEDIATE, 2).unbind(-1),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=("static", "dynamic"))
@pytest.mark.parametrize("combine", COMBINES)
def test_gates(combine, dynamic, tmp_path):
    calls = [(hidden_states(*size),) for size in (SIZES if dynamic else SIZES[:1])]
    check(Gated(COMBINES[combine]), *calls, into=tmp_path, found=[*ONE_SITE], dynamic=dynamic)


@pytest.mark.parametrize(
    ("cut", "combine", "dynamic"),
    [  # each cut and each gate, static and dynamic
        (cut, ("swiglu", "geglu", "bilinear")[(row + dynamic) % 3], dynamic)
        for row, cut in enumerate(CUTS)
        for dynamic in (False, True)
    ],
)
def test_fused_gates(cut, combine, dynamic, tmp_path):
    calls = [(hidden_states(*size),) for size in (SIZES if dynamic else SIZES[:1])]
    model = FusedGate(CUTS[cut], COMBINES[combine])
    check(model, *calls, into=tmp_path, found=[*ONE_SITE], dynamic=dynamic)


@pytest.mark.parametrize("dense", ["gate", "up", "down"])
def test_gates_with_one_dense_projection(dense, tmp_path):
    model = Gated(COMBINES["swiglu"], **{dense: nn.Linear})
    check(model, (hidden_states(),), into=tmp_path, found=[*ONE_SITE])


@pytest.mark.parametrize("seed", range(6))
def test_random_mixtures(seed, tmp_path):
    rng = random.Random(seed)
    names = [rng.choice(list(PROJECTIONS)) for _ in range(3)]
    if "dense" in names:
        names[rng.randrange(3)] = "raw_bias"
    gate, up, down = (PROJECTIONS[name] for name in names)
    model = Gated(COMBINES[rng.choice(list(COMBINES))], gate, up, down)
    dynamic = seed % 2 == 1
    calls = [(hidden_states(*size),) for size in (SIZES if dynamic else SIZES[:1])]
    sites = check(model, *calls, into=tmp_path, dynamic=dynamic)
    found = [s["lowering"] for s in sites if s["kind"] == "feed_forward"]
    assert found == ([] if names == ["dense"] * 3 else ["row_blocks"]), names


# ---- what surrounds a site ----------------------------------------------------------------------


def test_flattened_tokens(tmp_path):
    class Flat(FeedForward):
        def forward(self, x):
            return super().forward(x.reshape(-1, x.size(-1))).view(x.shape)

    check(Flat(F.gelu), (hidden_states(),), into=tmp_path, found=[*ONE_SITE])


def test_result_returned_before_and_after_a_view(tmp_path):
    """What leaves the graph has eager's strides."""
    model = FeedForward(F.gelu, _tokens_last(HIDDEN, INTERMEDIATE), _tokens_last(INTERMEDIATE, 4))
    x = hidden_states()
    check(model, (x,), into=tmp_path)
    compiled = torch.compile(model, backend="flashsvd", options={"compiler": "eager"})
    assert compiled(x).stride() == model(x).stride()


@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_none_and_one(batch, tmp_path):
    check(FeedForward(F.gelu), (hidden_states(batch),), into=tmp_path,
          found=[*ONE_SITE] if batch else None)  # fmt: skip


CHANGES = {
    "expanded": lambda x: x[:1, :1].expand_as(x),
    "transposed": lambda x: x.transpose(0, 1),
    "strided": lambda x: x.repeat(1, 1, 2)[..., ::2],
}


@pytest.mark.parametrize("change", CHANGES)
def test_strides_of_the_input_do_not_matter(change, tmp_path):
    check(
        FeedForward(F.gelu), (CHANGES[change](hidden_states()),), into=tmp_path, found=[*ONE_SITE]
    )


def test_residual_stream_written_in_place(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN)
            self.first, self.second = FeedForward(F.gelu), Gated(COMBINES["swiglu"])

        def forward(self, x):
            x = self.embed(x)
            x += self.first(self.norm(x))
            x += self.second(self.norm(x))
            return x

    check(Block(), (hidden_states(),), into=tmp_path, found=ONE_SITE * 2)


@pytest.mark.parametrize("activation", ["gelu", "silu", "gelu_new", "relu_squared_pow"])
@pytest.mark.parametrize("where", ["inside", "around"])
def test_autocast(where, activation, tmp_path):
    inner = FeedForward(ACTIVATIONS[activation])

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.inner(x)

    if where == "inside":
        check(Inside(), (hidden_states(),), into=tmp_path, found=[*ONE_SITE])
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check(inner, (hidden_states(),), into=tmp_path, found=[*ONE_SITE])


def test_bfloat16(tmp_path):
    model = Gated(COMBINES["swiglu"]).bfloat16()
    check(model, (hidden_states().bfloat16(),), into=tmp_path, found=[*ONE_SITE])


@pytest.mark.parametrize("gated", [False, True], ids=("plain", "gated"))
def test_gradients(gated):
    model = Gated(COMBINES["swiglu"]) if gated else FeedForward(F.gelu)
    compiled = torch.compile(
        model, backend="flashsvd", options={"compiler": "aot_eager", "feed_forward": "row_blocks"}
    )
    x = hidden_states()
    with torch.enable_grad():
        assert_same_gradients(model, compiled, x)
