"""Masks as predicates: what is claimed, and that the claim rebuilds the mask bit by bit.

Every case goes through torch.compile: the graph is normalised, the mask of its attention is
analysed, and when the graph runs the mask is put together again from the claim (causal, each term
narrowed to the dimensions that it keeps) and compared with the mask itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from flashsvd_compile.analysis.masks import Mask, analyse_mask
from flashsvd_compile.normalize import normalize

SDPA = torch.ops.aten.scaled_dot_product_attention.default
LOWEST = torch.finfo(torch.float32).min
INF = float("inf")
B, H, M, N = 2, 3, 5, 7
FROM_BELOW = ("n-m<=2", "n-m<=c")  # of static sizes, of dynamic ones


def described(mask: Mask) -> str:
    """``causal, b__k``: a term is the dimensions that it keeps, after a + if it is additive; bounds
    are ``causal``, ``n-m<=c`` and ``m-n<=c``."""
    terms = [
        "+" * t.additive + "".join(c if k else "_" for c, k in zip("bhqk", t.keeps, strict=True))
        for t in mask.terms
    ]
    bounds = []
    if mask.ahead is not None:
        ahead = mask.ahead if mask.ahead.is_number else "c"
        bounds.append("causal" if ahead == 0 else f"n-m<={ahead}")
    if mask.behind is not None:
        bounds.append(f"m-n<={mask.behind}")
    return ", ".join(bounds + sorted(terms)) or "none"


def numbers_of(values: dict[fx.Node, Any]) -> dict[sympy.Symbol, int]:
    """What the symbols of traced sizes are at run time."""
    found: dict[sympy.Symbol, int] = {}
    for node, value in values.items():
        traced, real = node.meta.get("val"), value
        pairs = [(traced, real)] if isinstance(traced, torch.SymInt) else []
        if isinstance(traced, torch.Tensor):
            pairs = list(zip(traced.shape, real.shape, strict=True))
        for size, number in pairs:
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                found[size.node.expr] = int(number)
    return found


def rebuilt(mask: Mask, values: dict[fx.Node, Any], sizes: tuple[int, ...]):
    """The booleans that the claim keeps, and the sum of what it adds."""
    attend = torch.ones(sizes, dtype=torch.bool)
    added = torch.zeros(sizes)
    numbers = numbers_of(values)
    m, n = torch.arange(sizes[2])[:, None], torch.arange(sizes[3])
    if mask.ahead is not None:
        attend = attend & (n - m <= int(mask.ahead.xreplace(numbers)))
    if mask.behind is not None:
        attend = attend & (m - n <= int(mask.behind.xreplace(numbers)))
    for term in mask.terms:
        value = values[term.node]
        value = value.reshape((1,) * (4 - value.dim()) + value.shape)
        for dim, keeps in enumerate(term.keeps):
            value = value if keeps else value.narrow(dim, 0, 1)
        assert term.additive == value.dtype.is_floating_point
        if term.additive:
            added = added + value
        else:
            attend = attend & value
    return attend, added


@dataclass
class Checking:
    """A backend that analyses the mask of each attention and checks the claim at run time."""

    masks: list[Mask] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, example_inputs):
        graph = normalize(gm, example_inputs)
        claims = {}
        for node in graph.graph.nodes:
            given = [a for a in node.args[3:4] if isinstance(a, fx.Node)]
            if node.target is SDPA and given:
                query, key = (n.meta["val"].shape for n in node.args[:2])
                sizes = (*query[:3], key[2])
                claims[node] = self._analyse(given[0], sizes)
        self.masks += claims.values()

        def run(*inputs):
            return _Rebuilding(graph, claims).run(*inputs)

        return run

    @staticmethod
    def _analyse(node: fx.Node, sizes) -> Mask:
        symbols = [s for s in sizes if isinstance(s, torch.SymInt)]
        guards = [len(s.node.shape_env.guards) for s in symbols]
        mask = analyse_mask(node, sizes)
        assert guards == [len(s.node.shape_env.guards) for s in symbols]
        return mask


class _Rebuilding(fx.Interpreter):
    def __init__(self, graph, claims):
        super().__init__(graph, garbage_collect_values=False)
        self.claims = claims

    def run_node(self, n: fx.Node):
        if n in self.claims:
            operands: Any = n.args
            claim, original = self.claims[n], self.env[operands[3]]
            query, key = (self.env[a] for a in operands[:2])
            sizes = (*query.shape[:3], key.shape[2])
            attend, added = rebuilt(claim, self.env, sizes)
            original = original.expand(sizes)
            if original.dtype is torch.bool:
                assert torch.equal(attend, original)
            elif any(term.additive for term in claim.terms):
                assert torch.equal(torch.where(attend, added, -INF), original)
            else:
                assert torch.equal(attend, original == 0)
                assert (original[~attend] <= -1e4).all()
        return super().run_node(n)


def analysed(mask_of: Callable, dynamic: bool, sizes=(B, H, M, N)) -> Mask:
    batch, heads, queries, keys = sizes
    torch.manual_seed(0)
    query, key = torch.randn(batch, heads, queries, 4), torch.randn(batch, heads, keys, 4)
    pad = torch.arange(keys).expand(batch, keys) < torch.arange(keys, keys - batch, -1)[:, None]
    data = {
        "pad": pad.long(),
        "ids": torch.randint(0, 3, (batch, keys)),
        "lengths": torch.randint(1, keys + 1, (batch,)),
        "bias": torch.randn(1, heads, queries, keys),
    }

    def attend(query, key, data):
        mask = mask_of(Inputs(query, key, data))
        mask = mask[None] if mask.dim() == 1 else mask  # SDPA takes no mask of one dimension
        return scaled_dot_product_attention(query, key, key, attn_mask=mask)

    torch._dynamo.reset()
    backend = Checking()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(attend, backend=backend, dynamic=dynamic, fullgraph=True)
        compiled(query, key, {name: t.clone() for name, t in data.items()})
    (mask,) = backend.masks
    return mask


class Inputs:
    """What a case is made of: sizes (maybe symbolic), index tensors, data."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, data: dict[str, torch.Tensor]):
        self.B, self.H, self.M, self.N = (*query.shape[:3], key.shape[2])
        self.q = torch.arange(self.M)[:, None]
        self.k = torch.arange(self.N)
        self.b = torch.arange(self.B)[:, None, None, None]
        self.pad, self.ids = data["pad"], data["ids"]
        self.lengths, self.bias = data["lengths"], data["bias"]
        self.pad4 = self.pad[:, None, None, :].bool()

    @property
    def lowest(self):
        """A constant of the trace; a global float may become an input of the graph."""
        return torch.finfo(self.bias.dtype).min

    @property
    def causal(self):
        return self.k <= self.q

    def ones(self, *size, **kwargs):
        return torch.ones(*(size or (self.M, self.N)), **kwargs)


def _filled_in_place(i):
    mask = i.ones(dtype=torch.bool)
    mask.tril_()
    return mask


def _base_written_to(i):
    keep = i.causal & i.ones(dtype=torch.bool)
    keep.view(-1)[:3].zero_()
    return keep


def _data_dependent(i):
    longest = i.lengths.max().item()
    return i.k < longest


def _wrapped(i):
    return torch.arange(i.N, dtype=torch.int8) + 124 >= 0


def _unequal_packed(i):
    return (i.ids[:, None, :, None] == i.ids[:, None, None, :])[:, :, : i.M] & i.causal


def _gathered_positions(i):
    positions = i.k[None].expand(i.B, -1)
    keys = positions[i.b, i.k[None, None, None]]
    return keys <= i.q[None, None]


CASES: dict[str, tuple[Callable[[Inputs], Any], str]] = {
    # provably true everywhere
    "all true: q >= 0, expanded": (lambda i: (i.q >= 0).expand(i.B, 1, -1, i.N), "none"),
    "all true: k < N": (lambda i: i.k < i.N, "none"),
    "all true: k - N <= -1": (lambda i: (i.k - i.N <= -1)[None, None, None], "none"),
    "all true: b >= 0 and ones": (lambda i: (i.b >= 0) & i.ones(dtype=torch.bool), "none"),
    "all true: q + k < M + N": (lambda i: i.q + i.k < i.M + i.N, "none"),
    "all true: or": (lambda i: (i.q >= 0) | i.pad4, "none"),
    "near all true: k < N - 1": (lambda i: i.k < i.N - 1, "___k"),
    "near all true: k > 0": (lambda i: i.k > 0, "___k"),
    "near all true: q < N": (lambda i: (i.q < i.M - 1).expand(i.B, 1, -1, i.N), "__q_"),
    "all false is kept": (lambda i: i.k < 0, "____"),
    # causal, in any spelling
    "causal: k <= q": (lambda i: i.causal, "causal"),
    "causal: q >= k": (lambda i: i.q >= i.k, "causal"),
    "causal: k - q <= 0": (lambda i: i.k - i.q <= 0, "causal"),
    "causal: k < q + 1": (lambda i: i.k < i.q + 1, "causal"),
    "causal: not k > q": (lambda i: ~(i.k > i.q), "causal"),
    "causal: twice": (lambda i: i.causal & (i.q >= i.k) & ~(i.k > i.q), "causal"),
    "causal: tril of booleans": (lambda i: i.ones(dtype=torch.bool).tril(), "causal"),
    "causal: tril of floats": (lambda i: i.ones().tril().bool(), "causal"),
    "causal: triu of integers == 0": (lambda i: i.ones(dtype=torch.int32).triu(1) == 0, "causal"),
    "causal: 1 - triu": (lambda i: (1 - i.ones().triu(1)).to(torch.bool), "causal"),
    "causal: logical_not": (lambda i: torch.triu(i.ones(), diagonal=1).logical_not(), "causal"),
    "causal: views": (lambda i: i.k.view(1, 1, 1, -1) <= i.q.view(1, 1, -1, 1), "causal"),
    "causal: transposed": (
        lambda i: (torch.arange(i.N)[:, None] <= torch.arange(i.M)).transpose(0, 1),
        "causal",
    ),
    "causal: permuted, squeezed": (
        lambda i: i.causal[None, :, None].permute(2, 0, 1, 3).squeeze(0),
        "causal",
    ),
    "causal: axes swapped": (lambda i: (i.k[:, None] <= i.q.T).swapaxes(0, 1), "causal"),
    "causal: one of many": (
        lambda i: (i.k <= i.q + torch.arange(-2, 3)[:, None, None])[2],
        "causal",
    ),
    "causal: last of many": (
        lambda i: (i.k <= i.q + torch.arange(-2, 1)[:, None, None])[-1],
        "causal",
    ),
    "bound: another of many": (
        lambda i: (i.k <= i.q + torch.arange(-2, 3)[:, None, None])[1],
        "n-m<=-1",
    ),
    "causal: a size in a tensor": (
        lambda i: i.k + torch.full((), i.M) < i.q + i.M + 1,
        "causal",
    ),
    "causal: integers": (lambda i: (i.causal.int() | (i.k < 0).int()) != 0, "causal"),
    "causal: slice of a buffer": (
        lambda i: i.ones(1, 1, 32, 32, dtype=torch.bool).tril()[:, :, : i.M, : i.N],
        "causal",
    ),
    "causal: offsets that cancel": (lambda i: torch.arange(i.N + 3)[3:] - 3 <= i.q, "causal"),
    "causal: gathered positions": (_gathered_positions, "causal"),
    "causal: xor with true": (lambda i: (i.k > i.q) ^ (i.k >= 0), "causal"),
    "causal: scores == 0": (lambda i: torch.where(i.causal, 0.0, i.lowest) == 0, "causal"),
    "bound: k < q": (lambda i: i.k < i.q, "n-m<=-1"),
    "bound: k <= q + 1": (lambda i: i.k <= i.q + 1, "n-m<=1"),
    "bound: reversed": (lambda i: i.q <= i.k, "m-n<=0"),
    "bound: from the bottom right": (lambda i: i.k <= i.q + (i.N - i.M), FROM_BELOW),
    "bound: slice": (lambda i: torch.arange(i.N + 3)[3:] <= i.q, "n-m<=-3"),
    "bound: last positions": (lambda i: i.k <= torch.arange(i.N)[-i.M :, None], FROM_BELOW),
    "near causal: an index that wraps": (lambda i: i.k[i.k - 1] <= i.q, "__qk"),
    "near causal: a slice that torch clamps": (lambda i: i.k[-100:] <= i.q, "__qk"),
    "near causal: bits read as integers": (lambda i: i.k.double().view(torch.int64) <= i.q, "__qk"),
    "near causal: step": (lambda i: torch.arange(0, 2 * i.N, 2) <= i.q, "__qk"),
    "bound: tril(1)": (lambda i: i.ones(dtype=torch.bool).tril(1), "n-m<=1"),
    "near causal: floats": (lambda i: i.k.float() <= i.q.float(), "__qk"),
    "near causal: float arange": (lambda i: torch.arange(0.0, i.N) <= i.q, "__qk"),
    "near causal: or prefix": (lambda i: i.causal | (i.k < i.lengths[:, None, None, None]), "b_qk"),
    "near causal: flipped": (lambda i: i.causal.flip(-1), "__qk"),
    "window": (lambda i: i.causal & (i.q - i.k < 3), "causal, m-n<=2"),
    "window: both ways": (lambda i: (i.q - i.k).abs() <= 2, "__qk"),
    "window: both ways, one by one": (
        lambda i: (i.q - i.k <= 2) & (i.k - i.q <= 2),
        "n-m<=2, m-n<=2",
    ),
    "window: of data": (lambda i: i.q - i.k < i.lengths[:, None, None, None], "b_qk"),
    "window: two of them": (
        lambda i: (i.q - i.k < 3) & (i.q - i.k < i.B),
        ("m-n<=1, __qk", "m-n<=2, __qk"),
    ),
    "window: and a step": (lambda i: (2 * i.q - i.k < 3) & i.causal, "causal, __qk"),
    # data
    "padding": (lambda i: i.pad4, "b__k"),
    "padding, expanded": (lambda i: i.pad4.expand(-1, i.H, i.M, -1), "b__k"),
    "padding == 1": (lambda i: i.pad[:, None, None] == 1, "b__k"),
    "padding, gathered": (lambda i: i.pad.bool()[i.b, i.k], "b__k"),
    "padding, gathered with None": (
        lambda i: i.pad.bool()[:, None, :][:, :, i.k][:, None],
        "b__k",
    ),
    "padding, shifted": (lambda i: i.pad.bool()[i.b, i.k - 1], "b__k"),
    "padding from lengths": (lambda i: i.k < i.lengths[:, None, None, None], "b__k"),
    "padding and causal": (lambda i: i.pad4 & i.causal, "causal, b__k"),
    "padding times causal": (lambda i: i.pad4 * i.causal, "causal, b__k"),
    "padding and causal, integers": (
        lambda i: (i.pad4.long() & i.causal.long()).bool(),
        "causal, b__k",
    ),
    "everything of a decoder": (
        lambda i: ((i.q >= 0) & i.causal & i.pad4 & (i.q - i.k < 3)).expand(i.B, 1, -1, -1),
        "causal, m-n<=2, b__k",
    ),
    "not or": (lambda i: ~((i.k > i.q) | ~i.pad4), "causal, b__k"),
    "not or, unnamed": (lambda i: ~((i.k > i.q) | (i.pad4 == 0)), "causal, b__k"),
    "not or, data compared": (
        lambda i: ~((i.k > i.q) | (i.pad[:, None, None] < 1)),
        "causal, b_qk",
    ),
    "three dimensions": (lambda i: (i.causal & i.pad[:, None].bool())[:, None], "causal, b_qk"),
    "packed sequences": (_unequal_packed, "causal, b_qk"),
    "random": (lambda i: torch.rand(i.M, i.N) > 0.5, "__qk"),
    "item": (_data_dependent, "___k"),
    "integers that wrap": (_wrapped, "___k"),
    "unsigned against negative": (lambda i: i.k.to(torch.uint8) > i.q.to(torch.uint8) - 1, "__qk"),
    "filled in place": (_filled_in_place, "__qk"),
    "base written to": (_base_written_to, "__qk"),
    # additive
    "zeros": (lambda i: torch.zeros(i.M, i.N), "none"),
    "constant": (lambda i: torch.full((i.M, i.N), -5.0), "+____"),
    "bias": (lambda i: i.bias, "+_hqk"),
    "-inf: causal": (lambda i: torch.where(i.causal, 0.0, -INF), "causal"),
    "-inf: causal, swapped": (lambda i: torch.where(i.k > i.q, -INF, 0.0), "causal"),
    "-inf: tensors": (
        lambda i: torch.where(i.causal & i.pad4, torch.tensor(0.0), torch.tensor(-INF)),
        "causal, b__k",
    ),
    "-inf: masked_fill": (
        lambda i: torch.zeros(i.M, i.N).masked_fill(~(i.causal & i.pad4), -INF),
        "causal, b__k",
    ),
    "-inf: triu": (lambda i: torch.full((i.M, i.N), -INF).triu(1), "causal"),
    "-inf: sum": (
        lambda i: torch.where(i.causal, 0.0, -INF) + torch.where(i.pad4, 0.0, -INF),
        "causal, b__k",
    ),
    "-inf: unnamed": (
        lambda i: torch.zeros(i.M, i.N).masked_fill((i.k > i.q) | (i.ids[:, None, None] < 1), -INF),
        "causal, +b_qk",
    ),
    "lowest: causal": (lambda i: torch.where(i.causal, 0.0, i.lowest), "causal"),
    "lowest: triu": (lambda i: torch.full((i.M, i.N), i.lowest).triu(1), "causal"),
    "lowest: (1 - keep) * lowest": (lambda i: (1.0 - i.causal.float()) * i.lowest, "causal"),
    "lowest: all true": (
        lambda i: torch.where((i.q >= 0) & (i.k < i.N), 0.0, i.lowest)[None, None],
        "none",
    ),
    "lowest: padding": (
        lambda i: torch.where(i.pad4, 0.0, i.lowest).expand(-1, -1, i.M, -1),
        "+b__k",
    ),
    "lowest: (1 - padding) * lowest": (
        lambda i: (1.0 - i.pad[:, None, None].float()) * i.lowest,
        "+b__k",
    ),
    "lowest: causal and padding": (
        lambda i: torch.where(i.causal & i.pad4, 0.0, i.lowest),
        "+b_qk",
    ),
    "lowest: window": (
        lambda i: torch.where(i.causal & (i.k > i.q - 3), 0.0, i.lowest),
        ("causal, m-n<=2", "+__qk"),
    ),
    "lowest: window, and queries beyond all keys": (
        lambda i: torch.where(i.causal & (i.k > i.q - 1) & (i.q < i.M), 0.0, i.lowest),
        ("causal, m-n<=0", "+__qk"),
    ),
    "lowest: from the bottom right": (
        lambda i: torch.where(i.k <= i.q + (i.N - i.M), 0.0, i.lowest),
        ("n-m<=2", "+__qk"),
    ),
    "lowest: the first query sees no key": (
        lambda i: torch.where(i.k < i.q, 0.0, i.lowest),
        "+__qk",
    ),
    "near lowest: -100": (lambda i: torch.where(i.causal, 0.0, -100.0), "+__qk"),
    "near lowest: positive": (lambda i: torch.where(i.causal, 0.0, 1e9), "+__qk"),
    "near lowest: kept is not 0": (lambda i: torch.where(i.causal, 1.0, i.lowest), "+__qk"),
    "lowest: and bias": (lambda i: torch.where(i.pad4, 0.0, i.lowest) + i.bias, "+bhqk"),
    "-inf times 0 is NaN": (lambda i: (1.0 - i.causal.float()) * -INF, "+__qk"),
}
# NaN equals nothing, itself included: claimed only.
NOT_REBUILT = {"-inf times 0 is NaN"}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", CASES)
def test_claim(case, dynamic, monkeypatch):
    mask_of, expected = CASES[case]
    if isinstance(expected, tuple):
        expected = expected[dynamic]
    if case in NOT_REBUILT:
        monkeypatch.setattr(_Rebuilding, "run_node", fx.Interpreter.run_node)
    assert described(analysed(mask_of, dynamic)) == expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((2, 3, 6, 6), "causal"), ((2, 3, 9, 4), "causal"), ((1, 1, 1, 7), "causal")],
    ids=["square", "more queries", "one query sees the first key"],
)
def test_causal_is_from_the_top_left(sizes, expected):
    assert described(analysed(lambda i: i.causal, False, sizes)) == expected


def test_a_batch_as_long_as_the_heads_is_not_taken_for_them():
    def mask_of(i):
        return (i.causal & i.pad[:, None].bool())[:, None]

    assert described(analysed(mask_of, False, (H, H, M, N))) == "causal, b_qk"


@pytest.mark.parametrize(
    ("mask_of", "static", "dynamic"),
    [
        (lambda i: i.q - i.k < 100, "none", "m-n<=99"),
        (lambda i: i.k < 7, "none", "___k"),
        (lambda i: torch.arange(i.N, dtype=torch.int8) >= 0, "none", "___k"),
        (lambda i: i.k.int() <= i.q, "causal", "__qk"),
        (lambda i: torch.where(i.causal, 0.0, LOWEST), "causal", "+__qk"),
    ],
    ids=["a long window", "a literal length", "int8", "int32", "a float that may change"],
)
def test_static_sizes_prove_more(mask_of, static, dynamic):
    assert described(analysed(mask_of, False)) == static
    assert described(analysed(mask_of, True)) == dynamic


# --- random masks -------------------------------------------------------------------------------

_positions = st.one_of(
    st.tuples(st.sampled_from(["q", "k"]), st.integers(-3, 3)),
    st.tuples(st.sampled_from(["N", "M"]), st.integers(-3, 1)),
)
_atoms = st.one_of(
    st.tuples(st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"]), _positions, _positions),
    st.sampled_from([("pad",), ("gathered",), ("packed",), ("lengths",), ("b",), ("true",)]),
)
_trees = st.recursive(
    _atoms,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["and", "and", "or", "xor"]), inner, inner),
        st.tuples(st.just("not"), inner),
    ),
    max_leaves=6,
)


def _position(i: Inputs, position):
    name, offset = position
    return (
        torch.full((1, 1), getattr(i, name)) + offset if name in "NM" else getattr(i, name) + offset
    )


def _built(i: Inputs, tree):
    kind, *parts = tree
    if kind in ("le", "lt", "ge", "gt", "eq", "ne"):
        return getattr(torch, kind)(_position(i, parts[0]), _position(i, parts[1]))[None, None]
    if kind == "not":
        return ~_built(i, parts[0])
    if kind in ("and", "or", "xor"):
        return getattr(torch, f"logical_{kind}")(*(_built(i, part) for part in parts))
    return {
        "pad": lambda: i.pad4,
        "gathered": lambda: i.pad.bool()[i.b, i.k],
        "packed": lambda: i.ids[:, None, None, :1] == i.ids[:, None, None, :],
        "lengths": lambda: i.q < i.lengths[:, None, None, None],
        "b": lambda: i.b >= 1,
        "true": lambda: i.ones(1, 1, dtype=torch.bool),
    }[kind]()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    tree=_trees,
    dynamic=st.booleans(),
    lengths=st.sampled_from([(5, 7), (6, 6), (7, 4)]),
    fill=st.sampled_from([None, "-inf", "lowest"]),
)
def test_random_masks_are_rebuilt(tree, dynamic, lengths, fill):
    def mask_of(i):
        mask = _built(i, tree)
        return (
            mask if fill is None else torch.where(mask, 0.0, i.lowest if fill == "lowest" else -INF)
        )

    analysed(mask_of, dynamic, (B, H, *lengths))


# --- models -------------------------------------------------------------------------------------


TINY = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "vocab_size": 50}


@pytest.mark.parametrize(
    ("name", "padded", "allowed"),
    [
        # Some versions pass no mask at all where nothing is masked.
        ("Bert", False, [set(), {"none"}]),
        ("Bert", True, [{"b__k"}]),
        ("Llama", False, [set(), {"causal"}]),
        ("Llama", True, [{"causal, b__k"}]),
        ("Mistral", True, [{"causal, m-n<=2, b__k"}]),
    ],
)
def test_models_of_transformers(name, padded, allowed):
    transformers = pytest.importorskip("transformers")
    window = {"sliding_window": 3, "num_key_value_heads": 4} if name == "Mistral" else {}
    config = getattr(transformers, f"{name}Config")(
        num_hidden_layers=1, attn_implementation="sdpa", **TINY, **window
    )
    model = getattr(transformers, f"{name}Model")(config).eval()
    backend = Checking()
    torch._dynamo.reset()
    ids, keep = torch.randint(0, 50, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    keep[1, 4:] = 0
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=True)(
            ids, attention_mask=keep if padded else None, use_cache=False
        )
    assert {described(mask) for mask in backend.masks} in allowed


@pytest.mark.parametrize(
    ("name", "padded", "expected"),
    [("Bert", True, "+b__k"), ("Llama", False, "causal"), ("Llama", True, "+b_qk")],
)
def test_eager_models_of_transformers(name, padded, expected):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        num_hidden_layers=1, attn_implementation="eager", **TINY
    )
    found = set()

    def backend(gm, example_inputs):
        graph = normalize(gm, example_inputs)
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.where.ScalarOther:
                batch, _, queries, keys = node.meta["val"].shape
                found.add(described(analyse_mask(node, (batch, 4, queries, keys))))
        return graph

    torch._dynamo.reset()
    model = torch.compile(getattr(transformers, f"{name}Model")(config).eval(), backend=backend)
    ids = torch.randint(0, 50, (2, 7))
    with torch.no_grad():
        model(ids, attention_mask=torch.ones_like(ids) if padded else None, use_cache=False)
    assert found == {expected}


# --- graphs by hand -----------------------------------------------------------------------------


FAKE = FakeTensorMode()


def _placeholder(graph: fx.Graph, *shape, dtype=torch.bool) -> fx.Node:
    node = graph.placeholder(f"arg{len(graph.nodes)}")
    with FAKE:
        node.meta["val"] = torch.empty(shape, dtype=dtype)
    return node


@pytest.mark.parametrize(
    ("shape", "dtype", "sizes", "message"),
    [
        ((1, 2, 3, 4, 5), torch.bool, (2, 3, 4, 5), "does not broadcast"),
        ((4, 6), torch.bool, (2, 3, 4, 5), "does not broadcast"),
        ((4, 5), torch.int64, (2, 3, 4, 5), "boolean or floating point"),
        ((4, 5), torch.bool, (4, 5), "4 sizes"),
    ],
)
def test_bad_input_is_named(shape, dtype, sizes, message):
    node = _placeholder(fx.Graph(), *shape, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        analyse_mask(node, sizes)


def test_deep_graphs_do_not_recurse():
    graph = fx.Graph()
    node = pad = _placeholder(graph, B, 1, 1, N)
    for _ in range(3000):
        node = graph.call_function(torch.ops.aten.logical_not.default, (node,))
        node.meta["val"] = pad.meta["val"]
    mask = analyse_mask(node, (B, H, M, N))
    assert described(mask) == "b__k"
    assert mask.terms[0].node is pad


def test_wide_conjunctions_become_data():
    graph = fx.Graph()
    node, *others = (_placeholder(graph, B, 1, 1, N) for _ in range(100))
    for other in others:
        node = graph.call_function(torch.ops.aten.bitwise_and.Tensor, (node, other))
        node.meta["val"] = other.meta["val"]
    mask = analyse_mask(node, (B, H, M, N))
    assert 1 < len(mask.terms) < 100
    assert all(term.keeps == (True, False, False, True) for term in mask.terms)
