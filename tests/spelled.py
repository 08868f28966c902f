"""Low-rank attention and feed-forwards in many spellings, and the check that each one gets.

Sizes are tiny and no two of them are equal, so that no dimension can be taken for another.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

# Kinds of sites that are told beside those of attention and feed-forwards.
LONE_PRODUCTS = ("chain", "siblings")

OPTIONS = {"compiler": "eager", "attention": "rank_space", "feed_forward": "row_blocks"}

BATCH, QUERIES, KEYS, HIDDEN, HEADS, HEAD_DIM, RANK = 2, 5, 7, 30, 3, 8, 4
INTERMEDIATE = 44
ALL_LOW_RANK = {"q": "4", "k": "4", "v": "4"}


class Spelled(nn.Module):
    """Parameters by shape, drawn so that products keep the variance, and a forward of them.

    A product sums over a factor's last axis but one, or over the axis that ``summed`` says.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        summed: Mapping[str, int] = MappingProxyType({}),
        **shapes: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.spelling = forward
        for name, shape in shapes.items():
            is_bias = len(shape) == 1 or name.startswith("b")
            fan_in = 3 if is_bias else shape[summed.get(name, -2)]
            parameter = nn.Parameter(torch.randn(shape) / math.sqrt(fan_in))
            self.register_parameter(name, parameter)

    def forward(self, *args: Any) -> Any:
        return self.spelling(self, *args)


def hidden_states(batch: int = BATCH, rows: int = QUERIES, hidden: int = HIDDEN) -> Tensor:
    return torch.randn(batch, rows, hidden)


def low_rank(inputs: int, outputs: int, rank: int = RANK, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))


class NormReaders(nn.Module):
    """``count`` feed-forwards and ``library`` linears of one norm of x [.., 32]."""

    def __init__(self, count: int, library: int = 0, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or nn.LayerNorm(32)
        self.ups = nn.ModuleList(low_rank(32, 64) for _ in range(count))
        self.downs = nn.ModuleList(low_rank(64, 32) for _ in range(count))
        self.linears = nn.ModuleList(nn.Linear(32, 8) for _ in range(library))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        normed = self.norm(x)
        fed = [
            down(nn.functional.gelu(up(normed)))
            for up, down in zip(self.ups, self.downs, strict=True)
        ]
        return [*fed, *(linear(normed) for linear in self.linears)]


# ---- the check ----------------------------------------------------------------------------------


def check(
    model: Callable[..., Any],
    *calls: tuple[Any, ...],
    into: Path,
    found: list[str] | None = None,
    ranks: dict[str, str] | None = None,
    dynamic: bool | None = None,
    graphs: int = 1,
    options: Mapping[str, Any] = MappingProxyType(OPTIONS),
) -> list[dict[str, Any]]:
    """Compile ``model`` once and run every call of it; its results must be as good as eager's.

    ``found``: the sites, each as ``"kind lowering"``, near-misses as ``"kind skipped"``; chains
    and siblings are left out, unless ``options`` say how to run them. ``ranks``: of the first
    attention.
    ``graphs``: how many graphs may be compiled. Returns the sites of all graphs as the backend
    dumps them into the empty directory ``into``.
    """
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend="flashsvd", options={**options, "debug_dir": str(into)}, dynamic=dynamic
    )
    # Drawing takes longer than most of these calls, and has tests of its own.
    with no_pass_may_fail(), patch("flashsvd_compile.report.png_of", return_value=b""):
        for args in calls:
            assert_as_good_as_eager(model, compiled, args)
    dumps = sorted(into.glob("graph_*/sites.json"))
    assert len(dumps) == graphs, f"{len(dumps)} graphs were compiled"
    sites = [site for dump in dumps for site in json.loads(dump.read_text())["sites"]]
    __tracebackhide__ = True
    untold = [kind for kind in LONE_PRODUCTS if options.get(kind, "auto") == "auto"]
    sites = [site for site in sites if site["kind"] not in untold]
    told = [f"{site['kind']} {site['lowering'] or 'skipped'}" for site in sites]
    reasons = "\n".join(f"{t}: {s['reason']}" for t, s in zip(told, sites, strict=True))
    if found is not None:
        assert told == found, reasons
    if ranks is not None:
        planned = [s["plan"]["ranks"] for s in sites if s["kind"] == "attention" and s["plan"]]
        assert planned[:1] == [ranks], reasons
    return sites


@contextmanager
def no_pass_may_fail() -> Any:
    """The backend falls back to the untouched graph with a warning: here that is an error."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("flashsvd_compile")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert not records, records[0].getMessage()


def assert_as_good_as_eager(model: Any, compiled: Any, args: tuple[Any, ...]) -> None:
    """The error against float64 is at most 1.1 times eager's own, plus four roundings."""
    expected, got = _leaves(model(*args)), _leaves(compiled(*args))
    exact = _leaves(in_float64(model, args))
    for want, have, truth in zip(expected, got, exact, strict=True):
        assert (have.dtype, have.shape) == (want.dtype, want.shape)
        budget = 1.1 * _error(want, truth) + 4 * torch.finfo(want.dtype).eps * _size(truth)
        assert _error(have, truth) <= budget, f"eager's own error is {_error(want, truth)}"


def assert_same_gradients(model: nn.Module, compiled: Any, x: Tensor) -> None:
    """Of all parameters, for the sum of the squared results."""
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def in_float64(model: Any, args: tuple[Any, ...]) -> Any:
    args = tuple(_double(a) for a in args)
    if not isinstance(model, nn.Module):
        return model(*args)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    state = {name: p.detach().double() for name, p in model.named_parameters()}
    assert set(dtypes.values()) <= {torch.float32, torch.bfloat16}
    return torch.func.functional_call(model, state, args)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _leaves(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def _error(value: Tensor, exact: Tensor) -> float:
    return _size(value.double() - exact)


def _size(value: Tensor) -> float:
    return float(value.detach().abs().max()) if value.numel() else 0.0


# ---- attention: projections [B, M, hidden] → [B, M, H·D] or [B, H, M, D] -------------------------


def _conv1d(self: Any, x: Tensor) -> Tensor:
    flat = x.view(-1, x.size(-1))
    latent = torch.addmm(self.b0, flat, self.u)
    return torch.addmm(self.b, latent, self.v).view(*x.size()[:-1], -1)


def _three_operands(self: Any, x: Tensor) -> Tensor:
    return torch.einsum("bsd,dhr,hre->bhse", x, self.u, self.v)


def _per_head_einsum(self: Any, x: Tensor) -> Tensor:
    latent = torch.einsum("bmd,hdr->bhmr", x, self.u)
    return torch.einsum("bhmr,hre->bhme", latent, self.v) + self.b


def _per_head_matmul(self: Any, x: Tensor) -> Tensor:
    return (x.unsqueeze(1) @ self.u) @ self.v + self.b


def _heads_last_einsum(self: Any, x: Tensor) -> Tensor:
    latent = torch.einsum("bmd,dhr->bmhr", x, self.u)
    return torch.einsum("bmhr,hre->bhme", latent, self.v)


def _shared_latent(self: Any, x: Tensor) -> Tensor:
    return torch.einsum("bmr,hre->bhme", x @ self.u, self.v)


def _groups(self: Any, x: Tensor) -> Tensor:
    """Palu: one latent, each group of it lifted on its own."""
    latent = x @ self.u
    groups = self.v.size(0)
    lifted = [part @ self.v[i] for i, part in enumerate(latent.chunk(groups, dim=-1))]
    return torch.cat(lifted, dim=-1)


def _separate_groups(self: Any, x: Tensor) -> Tensor:
    return torch.cat([(x @ self.u[g]) @ self.v[g] for g in range(self.u.size(0))], dim=-1)


def projection(
    name: str, inputs: int = HIDDEN, heads: int = HEADS, dim: int = HEAD_DIM, rank: int = RANK
) -> nn.Module:
    """A projection in one of the spellings of ``PROJECTIONS``."""
    from flashsvd_compile.compress import modules

    width = heads * dim
    return {
        "dense": lambda: nn.Linear(inputs, width),
        "sequential": lambda: low_rank(inputs, width, rank),
        "low_rank_module": lambda: modules.LowRankLinear(inputs, width, rank),
        "per_head_module": lambda: modules.PerHeadLowRankLinear(inputs, heads, dim, rank),
        "raw": lambda: Spelled(
            lambda self, x: (x @ self.u) @ self.v, u=(inputs, rank), v=(rank, width)
        ),
        "raw_bias": lambda: Spelled(
            lambda self, x: self.b + torch.matmul(torch.matmul(x, self.u), self.v),
            u=(inputs, rank), v=(rank, width), b=(width,),
        ),
        "conv1d": lambda: Spelled(
            _conv1d, u=(inputs, rank), v=(rank, width), b0=(rank,), b=(width,)
        ),
        "per_head_einsum": lambda: Spelled(
            _per_head_einsum, u=(heads, inputs, rank), v=(heads, rank, dim), b=(1, heads, 1, dim)
        ),
        "per_head_matmul": lambda: Spelled(
            _per_head_matmul,
            u=(1, heads, inputs, rank), v=(1, heads, rank, dim), b=(1, heads, 1, dim),
        ),
        "heads_last_einsum": lambda: Spelled(
            _heads_last_einsum, {"u": 0}, u=(inputs, heads, rank), v=(heads, rank, dim)
        ),
        "three_operands": lambda: Spelled(
            _three_operands, {"u": 0}, u=(inputs, heads, rank), v=(heads, rank, dim)
        ),
        "shared_latent": lambda: Spelled(
            _shared_latent, u=(inputs, rank), v=(heads, rank, dim)
        ),
        "viewed_factor": lambda: Spelled(
            lambda self, x: torch.einsum("bmr,rhe->bhme", nn.functional.linear(x, self.u.t()),
                                         self.v.view(rank, heads, dim)),
            u=(inputs, rank), v=(rank, width),
        ),
        "groups": lambda: Spelled(
            _groups, u=(inputs, heads * rank), v=(heads, rank, dim)
        ),
        "separate_groups": lambda: Spelled(
            _separate_groups, u=(heads, inputs, rank), v=(heads, rank, dim)
        ),
    }[name]()  # fmt: skip


PROJECTIONS = (
    "sequential", "low_rank_module", "per_head_module", "raw", "raw_bias", "conv1d",
    "per_head_einsum", "per_head_matmul", "heads_last_einsum", "three_operands", "shared_latent",
    "viewed_factor", "groups", "separate_groups",
)  # fmt: skip


# ---- attention: [B, M, H·D] → [B, H, M, D] ------------------------------------------------------


def _rearrange(x: Tensor, heads: int) -> Tensor:
    from einops import rearrange

    return rearrange(x, "b m (h d) -> b h m d", h=heads)


def _by_einsum(x: Tensor, heads: int) -> Tensor:
    return torch.einsum("bmhd->bhmd", x.view(*x.shape[:2], heads, -1))


HEAD_LAYOUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "view_transpose": lambda x, h: x.view(*x.shape[:2], h, x.size(-1) // h).transpose(1, 2),
    "reshape_permute": lambda x, h: x.reshape(x.size(0), -1, h, x.size(-1) // h).permute(
        0, 2, 1, 3
    ),
    "unflatten_movedim": lambda x, h: x.unflatten(-1, (h, -1)).movedim(-2, 1),
    "rearrange": _rearrange,
    "einsum": _by_einsum,
    "contiguous": lambda x, h: x.view(*x.shape[:2], h, -1).swapaxes(1, 2).contiguous(),
    "flat_and_back": lambda x, h: (
        x.view(*x.shape[:2], h, -1).transpose(1, 2).reshape(-1, x.size(1), x.size(2) // h)
        .view(x.size(0), h, x.size(1), -1)
    ),
}  # fmt: skip


def to_heads(x: Tensor, layout: str, heads: int) -> Tensor:
    return x if x.dim() == 4 else HEAD_LAYOUTS[layout](x, heads)


# ---- attention: q, k, v [B, H, ·, D] → [B, H, M, D] ---------------------------------------------

sdpa = torch.nn.functional.scaled_dot_product_attention


def _by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1))
    if mask is not None:
        scores = scores + mask
    weights = nn.functional.dropout(scores.softmax(-1), 0.1, training=False)
    return torch.matmul(weights, v)


def _einsum_where(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q * q.size(-1) ** -0.5, k)
    scores = torch.where(mask, scores, -torch.inf)
    return torch.einsum("bhij,bhjd->bhid", torch.softmax(scores, dim=3), v)


def _scaled_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ (k * 0.3).mT
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v


def _upcast(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3 + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v)


def _float_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3)).float() * 0.3
    scores = scores.masked_fill(mask.logical_not(), torch.finfo(scores.dtype).min)
    return scores.softmax(-1).type_as(v) @ v


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.size(2), x.size(3))


def _bmm(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.bmm(_flat(q) * 0.3, _flat(k).transpose(1, 2))
    return torch.bmm(scores.softmax(-1), _flat(v)).view(q.shape)


def _bloom(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """``baddbmm`` with the bias as its first argument, then 4-D for mask and softmax."""
    batch, heads, rows, _ = q.shape
    bias = mask.expand(batch, heads, rows, k.size(2)).reshape(batch * heads, rows, k.size(2))
    scores = bias.baddbmm(_flat(q), _flat(k).transpose(1, 2), beta=1.0, alpha=0.3)
    weights = scores.view(batch, heads, rows, -1).softmax(-1)
    return torch.bmm(weights.view(batch * heads, rows, -1), _flat(v)).view(q.shape)


def _neox(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """``baddbmm`` into zeros."""
    batch, heads, rows, _ = q.shape
    zeros = torch.zeros(batch * heads, rows, k.size(2), dtype=q.dtype)
    scores = torch.baddbmm(zeros, _flat(q), _flat(k).transpose(1, 2), beta=1.0, alpha=0.3)
    scores = scores.view(batch, heads, rows, -1) + mask
    return scores.softmax(-1) @ v


def _keys_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scores laid out [B, H, N, M], softmax over the keys' dimension."""
    weights = torch.softmax(k @ q.transpose(2, 3) * 0.3, dim=2)
    return weights.transpose(2, 3) @ v


def _rows_outside(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Operands and output [B, M, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(0.3).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


def _bool(*shape: int) -> Callable[..., Tensor]:
    return lambda *sizes: _seen(torch.rand(_shape(shape, sizes)) < 0.6)


def _seen(mask: Tensor) -> Tensor:
    """Every query sees key 0."""
    mask[..., 0] = True
    return mask


def _additive(*shape: int) -> Callable[..., Tensor]:
    return lambda *sizes: torch.randn(_shape(shape, sizes))


def _shape(shape: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
    names = dict(zip((BATCH, QUERIES, KEYS, HEADS), sizes, strict=True))
    return tuple(names.get(size, size) for size in shape)


# The mask's shape is spelled with the module's sizes, and takes those of the call.
ATTENDS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor] | None]] = {
    "sdpa": (lambda q, k, v, mask: sdpa(q, k, v), None),
    "sdpa_scale": (lambda q, k, v, mask: sdpa(q, k, v, scale=0.3), None),
    "sdpa_causal": (lambda q, k, v, mask: sdpa(q, k, v, is_causal=True), None),
    "sdpa_bool_bmn": (sdpa, _bool(BATCH, 1, QUERIES, KEYS)),
    "sdpa_bool_mn": (sdpa, _bool(QUERIES, KEYS)),
    "sdpa_bool_bn": (sdpa, _bool(BATCH, 1, 1, KEYS)),
    "sdpa_additive_hmn": (sdpa, _additive(1, HEADS, QUERIES, KEYS)),
    "sdpa_additive_bhmn": (sdpa, _additive(BATCH, HEADS, QUERIES, KEYS)),
    "sdpa_expanded": (
        lambda q, k, v, mask: sdpa(q, k, v, attn_mask=mask.expand(-1, -1, q.size(2), -1)),
        _bool(BATCH, 1, 1, KEYS),
    ),
    "sdpa_3d": (lambda q, k, v, mask: sdpa(_flat(q), _flat(k), _flat(v)).view(q.shape), None),
    "sdpa_3d_mask": (
        lambda q, k, v, mask: sdpa(_flat(q), _flat(k), _flat(v), mask).view(q.shape),
        _bool(QUERIES, KEYS),
    ),
    "by_hand": (_by_hand, None),
    "by_hand_additive_bn": (_by_hand, _additive(BATCH, 1, 1, KEYS)),
    "by_hand_additive_hmn": (_by_hand, _additive(HEADS, QUERIES, KEYS)),
    "einsum_where": (_einsum_where, _bool(BATCH, 1, QUERIES, KEYS)),
    "scaled_keys_masked_fill": (_scaled_keys, _bool(BATCH, 1, 1, KEYS)),
    "upcast": (_upcast, _additive(BATCH, 1, QUERIES, KEYS)),
    "float_scores_finite_fill": (_float_scores, _bool(BATCH, 1, QUERIES, KEYS)),
    "bmm": (_bmm, None),
    "bloom": (_bloom, _additive(BATCH, HEADS, 1, KEYS)),
    "neox": (_neox, _additive(BATCH, 1, 1, KEYS)),
    "keys_first": (_keys_first, None),
    "rows_outside": (_rows_outside, None),
}


class Attention(nn.Module):
    """q from ``x``, k and v from ``y``, in chosen spellings; merged heads, projected out."""

    def __init__(
        self,
        q: str = "sequential",
        k: str = "sequential",
        v: str = "sequential",
        layout: str = "view_transpose",
        attend: str = "sdpa",
        ranks: tuple[int, int, int] = (RANK, RANK, RANK),
        heads: int = HEADS,
        dim: int = HEAD_DIM,
    ) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            projection(name, heads=heads, dim=dim, rank=rank)
            for name, rank in zip((q, k, v), ranks, strict=True)
        )
        self.out = nn.Linear(heads * dim, HIDDEN)
        self.heads, self.layout, self.attend = heads, layout, ATTENDS[attend][0]

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            to_heads(project(of), self.layout, self.heads)
            for project, of in ((self.q, x), (self.k, y), (self.v, y))
        )
        attended = self.attend(q, k, v, mask)
        return self.out(attended.transpose(1, 2).flatten(2))


def attention_inputs(
    attend: str,
    batch: int = BATCH,
    queries: int = QUERIES,
    keys: int = KEYS,
    heads: int = HEADS,
) -> tuple[Tensor, ...]:
    make_mask = ATTENDS[attend][1]
    x, y = hidden_states(batch, queries), hidden_states(batch, keys)
    return (x, y) if make_mask is None else (x, y, make_mask(batch, queries, keys, heads))


# ---- attention: one projection for q, k and v, [B, M, hidden] → three [B, H, M, D] ---------------

_WIDTH = HEADS * HEAD_DIM


def _split_heads(x: Tensor) -> Tensor:
    return to_heads(x, "view_transpose", HEADS)


def _sliced(x: Tensor) -> list[Tensor]:
    return [x[..., :_WIDTH], x[..., _WIDTH : 2 * _WIDTH], x[..., 2 * _WIDTH :]]


def _parts_first(x: Tensor) -> Tensor:
    """timm: [3, B, H, M, D]."""
    return x.reshape(x.size(0), x.size(1), 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)


def _parts_last(x: Tensor) -> list[Tensor]:
    """BLOOM: q, k and v side by side for each head."""
    x = x.view(x.size(0), x.size(1), HEADS, 3, HEAD_DIM)
    return [x[..., i, :].transpose(1, 2) for i in range(3)]


def _chunked_per_head(x: Tensor) -> list[Tensor]:
    """GPT-NeoX: 3·D wide heads, cut after the heads have moved."""
    x = x.view(x.size(0), -1, HEADS, 3 * HEAD_DIM).transpose(1, 2)
    return list(x.chunk(3, dim=-1))


def _rearranged(x: Tensor) -> Tensor:
    from einops import rearrange

    return rearrange(x, "b m (p h d) -> p b h m d", p=3, h=HEADS)


FUSED_CUTS: dict[str, Callable[[Tensor], Any]] = {
    "chunk": lambda x: map(_split_heads, x.chunk(3, dim=-1)),
    "split": lambda x: map(_split_heads, x.split(_WIDTH, dim=2)),
    "split_sizes": lambda x: map(_split_heads, x.split([_WIDTH] * 3, dim=-1)),
    "tensor_split": lambda x: map(_split_heads, torch.tensor_split(x, 3, dim=-1)),
    "slice": lambda x: map(_split_heads, _sliced(x)),
    "narrow": lambda x: (_split_heads(x.narrow(2, i * _WIDTH, _WIDTH)) for i in range(3)),
    "unbind": lambda x: _parts_first(x).unbind(0),
    "select": lambda x: [_parts_first(x)[i] for i in range(3)],
    "unbind_middle": lambda x: (
        part.transpose(1, 2) for part in x.view(*x.shape[:2], 3, HEADS, HEAD_DIM).unbind(2)
    ),
    "parts_last": _parts_last,
    "chunked_per_head": _chunked_per_head,
    "rearrange": _rearranged,
}


def _fused_latents(self: Any, x: Tensor) -> Any:
    """One down-projection for all, an up-projection for each."""
    latents = (x @ self.u).split(RANK, dim=-1)
    return [latent @ self.v[i] for i, latent in enumerate(latents)]


def _one_latent(self: Any, x: Tensor) -> Any:
    latent = x @ self.u
    return [torch.nn.functional.linear(latent, self.v[i]) for i in range(3)]


def fused_projection(name: str) -> nn.Module:
    from flashsvd_compile.compress import modules

    return {
        "sequential": lambda: low_rank(HIDDEN, 3 * _WIDTH),
        "conv1d": lambda: projection("conv1d", heads=3 * HEADS),
        "per_head_module": lambda: modules.FusedPerHeadLowRankLinear(
            HIDDEN, 3, HEADS, HEAD_DIM, RANK
        ),
        "latents": lambda: Spelled(
            _fused_latents, u=(HIDDEN, 3 * RANK), v=(3, RANK, _WIDTH)
        ),
        "one_latent": lambda: Spelled(
            _one_latent, u=(HIDDEN, RANK), v=(3, _WIDTH, RANK)
        ),
    }[name]()  # fmt: skip


class FusedAttention(nn.Module):
    """Self-attention over one fused projection, cut by ``cut`` (None: it returns three)."""

    def __init__(self, fused: str, cut: str | None, attend: str = "sdpa") -> None:
        super().__init__()
        self.qkv = fused_projection(fused)
        self.cut, self.attend = cut, ATTENDS[attend][0]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        made = self.qkv(x)
        q, k, v = map(_split_heads, made) if self.cut is None else FUSED_CUTS[self.cut](made)
        return self.attend(q, k, v, mask).transpose(1, 2).flatten(2)
