"""Axes and factored facts under random chains of layout operators.

A lifted tensor is viewed, permuted, cut, expanded and repeated at random. Wherever the analysis
still claims latent × factor, both are laid out by their atoms, multiplied, and laid out as the
atoms of the node say: element for element that must be the node. All values are small integers in
float64, so equal means equal.
"""

import math
import string

import pytest
import sympy
import torch
from flashsvd_compile.lowering.builder import Builder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from flashsvd_compile.analysis.axes import AxisSpace, quotient, same
from flashsvd_compile.analysis.sweep import sweep
from flashsvd_compile.normalize import _spell_constants

aten = torch.ops.aten


def _lifted(chain):
    """``chain`` of a lifted tensor [2, 6, 24] with a bias; latent, factor and bias as inputs."""
    inputs = [
        torch.arange(2 * 6 * 3).reshape(2, 6, 3).double(),
        torch.arange(24 * 3).reshape(24, 3).double() % 11,
        torch.arange(24).double(),
    ]
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # indices are real, as in a model
    fakes = [mode.from_tensor(tensor) for tensor in inputs]

    def run(latent, factor, bias):
        return chain(torch.nn.functional.linear(latent, factor, bias))

    with mode:
        module = make_fx(run, pre_dispatch=True)(*fakes)
    _spell_constants(module)
    return module, inputs


def _claims(module):
    """Nodes of the traced module with a factored fact, each beside what the fact says it is."""
    facts = sweep(module.graph)
    output = module.graph.find_nodes(op="output")[0]
    builder = Builder(output, facts.space)
    return [
        (node, _rebuilt(builder, facts, node))
        for node in list(module.graph.nodes)
        if node in facts.factored
    ]


def _rebuilt(builder, facts, node):
    fact, space = facts.factored[node], facts.space
    leaves = [a for dim in space.refine(facts.axes[node]) for a in dim]
    total = _product(builder, space, [fact.latent, fact.factor], leaves)
    for bias in fact.biases:
        total = builder.call(
            aten.add.Tensor, total, _product(builder, space, [bias.tensor], leaves)
        )
    full = builder.call(aten.expand.default, total, [int(a.size) for a in leaves])
    return builder.call(aten.reshape.default, full, list(node.meta["val"].shape))


def _product(builder, space, tensors, leaves):
    """The tensors' product, one dimension for each of ``leaves``, 1 long where they do not vary."""
    atoms = [tensor.atoms(space) for tensor in tensors]
    names = dict(
        zip({a: None for group in atoms for a in group}, string.ascii_letters, strict=False)
    )
    spelled = ["".join(names[a] for a in group) for group in atoms]
    out = "".join(names[a] for a in leaves if a in names)
    nodes = [builder.arrange(t, [(a,) for a in g]) for t, g in zip(tensors, atoms, strict=True)]
    product = builder.call(aten.einsum.default, f"{','.join(spelled)}->{out}", nodes)
    sizes = [int(a.size) if a in names else 1 for a in leaves]
    return builder.call(aten.reshape.default, product, sizes)


def check_claims(chain, must_hold=False):
    module, inputs = _lifted(chain)
    last = module.graph.find_nodes(op="output")[0].args[0]
    claims = _claims(module)
    assert not must_hold or last in [node for node, _ in claims], "the fact was lost"
    output = module.graph.find_nodes(op="output")[0]
    output.args = ([part for pair in claims for part in pair],)
    module.recompile()
    values = module(*inputs)
    for (node, _), real, said in zip(claims, values[::2], values[1::2], strict=True):
        assert torch.equal(real, said), node


# ---- random chains ------------------------------------------------------------------------------


def _divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def steps(draw, shape):
    """One layout operator for a tensor of ``shape``, as (name, arguments)."""
    rank = len(shape)
    dim = draw(st.integers(0, rank - 1))
    size = shape[dim]
    kinds = ["view", "permute", "flatten", "unsqueeze", "slice", "select", "chunk", "step",
             "expand", "repeat_interleave", "repeat", "squeeze", "cast", "scale",
             "index", "index_anything"]  # fmt: skip
    kind = draw(st.sampled_from(kinds))
    if kind == "view":
        outer = draw(st.sampled_from(_divisors(size)))
        return lambda x: x.reshape(*shape[:dim], outer, size // outer, *shape[dim + 1 :])
    if kind == "permute":
        order = draw(st.permutations(range(rank)))
        return lambda x: x.permute(order)
    if kind == "flatten":
        end = draw(st.integers(dim, rank - 1))
        return lambda x: x.flatten(dim, end)
    if kind == "slice":
        start = draw(st.integers(0, size - 1))
        stop = draw(st.integers(start + 1, size))
        return lambda x: x.narrow(dim, start, stop - start)
    if kind == "select":
        index = draw(st.integers(0, size - 1))
        return lambda x: x.select(dim, index) if rank > 1 else x
    if kind == "chunk":
        parts = draw(st.sampled_from(_divisors(size)))
        which = draw(st.integers(0, parts - 1))
        return lambda x: x.chunk(parts, dim)[which]
    if kind == "step":
        step = draw(st.sampled_from(_divisors(size)))
        start = draw(st.integers(0, step - 1))
        return lambda x: x.transpose(0, dim)[start::step].transpose(0, dim)
    if kind == "index":
        start = draw(st.integers(-size, size - 1))
        stop = draw(st.integers(start + 1, size if start >= 0 else 0))
        inner, outer = draw(st.integers(1, 2)), draw(st.integers(1, 2))
        picked = torch.arange(start, stop).repeat_interleave(inner).repeat(outer)
        return lambda x: x[(*[slice(None)] * dim, picked)]
    if kind == "index_anything":
        numbers = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=6))
        picked = torch.tensor(numbers)
        return lambda x: x.index_select(dim, picked)
    if kind == "expand":
        return lambda x: x.unsqueeze(dim).expand(*shape[:dim], 2, *shape[dim:])
    return {
        "unsqueeze": lambda x: x.unsqueeze(dim),
        "repeat_interleave": lambda x: x.repeat_interleave(2, dim),
        "repeat": lambda x: x.repeat(*(2 if i == dim else 1 for i in range(rank))),
        "squeeze": lambda x: x.squeeze() if x.numel() > 1 else x,
        "cast": lambda x: x.to(torch.float32).to(torch.float64),
        "scale": lambda x: x * 1,
    }[kind]


@st.composite
def chains(draw):
    shape = torch.Size((2, 6, 24))
    probe, chain = torch.empty(shape, device="meta"), []
    for _ in range(draw(st.integers(1, 8))):
        if probe.dim() == 0 or probe.numel() > 20_000 or probe.dim() > 7:
            break
        step = draw(steps(probe.shape))
        chain.append(step)
        probe = step(probe)

    def run(x):
        for step in chain:
            x = step(x)
        return x

    return run


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(chains())
def test_random_layouts(chain):
    check_claims(chain)


# ---- what must be found -------------------------------------------------------------------------

LAST, MIDDLE, GROUPS, TWICE = map(
    torch.tensor, ([-1], [-3, -2], [0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 3, 0, 1, 2, 3])
)
KEPT = {
    "heads": lambda x: x.view(2, 6, 4, 6).transpose(1, 2),
    "heads_flat_and_back": lambda x: (
        x.view(2, 6, 4, 6).transpose(1, 2).reshape(8, 6, 6).view(2, 4, 6, 6)
    ),
    "cut_then_heads": lambda x: x.chunk(3, -1)[1].unflatten(-1, (2, 4)),
    "heads_then_cut": lambda x: x.view(2, 6, 3, 8)[:, :, 1:].flatten(2),
    "cut_of_a_cut": lambda x: x[..., 4:20][..., 8:],
    "interleaved": lambda x: x[..., 1::3],
    "interleaved_twice": lambda x: x[..., ::2][..., 1::3],
    "groups_of_heads": lambda x: (
        x.view(2, 6, 4, 6)[:, :, :, None].expand(2, 6, 4, 3, 6).flatten(2, 3)
    ),
    "repeat_interleave": lambda x: x.view(2, 6, 4, 6).repeat_interleave(3, 2),
    "one_row": lambda x: x[:, 3].view(2, 4, 6),
    "one_row_by_index": lambda x: x[:, LAST],
    "one_head_by_index": lambda x: x.view(2, 6, 4, 6)[:, :, LAST],
    "heads_by_index": lambda x: x.view(2, 6, 4, 6)[:, :, MIDDLE],
    "groups_of_heads_by_index": lambda x: x.view(2, 6, 4, 6).index_select(2, GROUPS),
    "heads_twice_by_index": lambda x: x.view(2, 6, 4, 6)[:, :, TWICE],
    "one_of_the_batch": lambda x: x[1],
    "split_differently_twice": lambda x: x.view(2, 6, 4, 6).reshape(2, 6, 2, 12).reshape(2, 6, 24),
}


@pytest.mark.parametrize("name", KEPT)
def test_layouts_that_keep_the_fact(name):
    check_claims(KEPT[name], must_hold=True)


def test_dimensions_that_do_not_divide_lose_the_fact():
    module, _ = _lifted(lambda x: x.view(2, 6, 4, 6).reshape(2, 6, 3, 8))
    facts = sweep(module.graph)
    last = module.graph.find_nodes(op="output")[0].args[0]
    assert last not in facts.factored
    assert "do not divide" in facts.lost[last].reason.observed


NO_PICKS = {
    "backwards": lambda x: x.index_select(2, torch.tensor([1, 0])),
    "every_other": lambda x: x.index_select(2, torch.tensor([0, 2, 4])),
    "unequal_groups": lambda x: x.index_select(2, torch.tensor([0, 0, 1])),
    "both_ends": lambda x: x[..., torch.tensor([-1, 0])],
    "elements_of_a_matrix": lambda x: x[:, torch.tensor([0, 1]), torch.tensor([0, 1])],
    "by_a_computed_index": lambda x: x.index_select(2, x[0, 0, :2].long()),
}


@pytest.mark.parametrize("name", NO_PICKS)
def test_indexing_that_is_no_cut(name):
    module, _ = _lifted(NO_PICKS[name])
    facts = sweep(module.graph)
    last = module.graph.find_nodes(op="output")[0].args[0]
    assert last not in facts.factored
    assert "aten.index" in facts.lost[last].reason.observed


def test_an_index_that_is_written_to_is_no_cut():
    def chain(x):
        index = torch.tensor([0, 1])
        written = index.add_(1)
        return x.index_select(2, written)

    module, _ = _lifted(chain)
    (made,) = module.graph.find_nodes(op="call_function", target=aten.lift_fresh_copy.default)
    (node,) = module.graph.find_nodes(op="call_function", target=aten.index_select.default)
    node.update_arg(2, made)  # the same memory, by its first name
    assert node not in sweep(module.graph).factored


# ---- the space itself ---------------------------------------------------------------------------


@given(st.lists(st.integers(2, 6), min_size=1, max_size=4), st.data())
@settings(deadline=None)
def test_regrouping_keeps_the_row_major_order(sizes, data):
    """Flattened and split at random, the leaves read left to right stay the same elements."""
    space = AxisSpace()
    dims = space.fresh([sympy.Integer(s) for s in sizes])
    total = math.prod(sizes)
    inner = data.draw(st.sampled_from(_divisors(total)))
    regrouped = space.regroup(dims, (sympy.Integer(total // inner), sympy.Integer(inner)))
    if regrouped is None:
        return
    read = [a for dim in space.refine(regrouped) for a in dim]
    assert read == [a for dim in space.refine(dims) for a in dim]
    assert math.prod(int(a.size) for a in read) == total


def test_symbolic_sizes_divide_or_do_not():
    batch, heads = sympy.symbols("s0 s1", positive=True, integer=True)
    assert quotient(batch * heads, heads) == batch
    assert quotient(batch * 6, sympy.Integer(3)) == 2 * batch
    assert quotient(batch, sympy.Integer(2)) is None
    assert quotient(sympy.Integer(6), batch) is None
    assert same(batch * (heads + 1), batch * heads + batch)
    assert not same(batch, heads)


def test_parts_of_two_axes_are_aligned():
    space = AxisSpace()
    left = space.fresh([sympy.Integer(s) for s in (2, 12)])
    right = space.fresh([sympy.Integer(s) for s in (8, 3)])
    flat = [tuple(a for dim in dims for a in dim) for dims in (left, right)]
    assert space.align(*flat)
    sizes = [[int(a.size) for a in space.leaves(dim)] for dim in flat]
    assert sizes[0] == sizes[1]
    assert not space.align(space.fresh([sympy.Integer(4)])[0], space.fresh([sympy.Integer(6)])[0])
