"""Every spelling of a matmul is read as the einsum that it is, or not at all."""

import string

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from flashsvd_compile.analysis.contraction import read_contraction

READ = {
    "linear": (F.linear, (2, 3, 4), (5, 4)),
    "linear_bias": (F.linear, (2, 3, 4), (5, 4), (5,)),
    "linear_2d": (F.linear, (3, 4), (5, 4)),
    "mm": (torch.mm, (3, 4), (4, 5)),
    "matmul": (torch.matmul, (2, 3, 4), (2, 4, 5)),
    "matmul_broadcast_right": (torch.matmul, (2, 6, 3, 4), (4, 5)),
    "matmul_broadcast_left": (torch.matmul, (3, 4), (2, 6, 4, 5)),
    "matmul_of_unequal_ranks": (torch.matmul, (6, 3, 4), (2, 6, 4, 5)),
    "bmm": (torch.bmm, (2, 3, 4), (2, 4, 5)),
    "addmm": (torch.addmm, (5,), (3, 4), (4, 5)),
    "addmm_alpha": (lambda b, x, y: torch.addmm(b, x, y, alpha=0.5), (5,), (3, 4), (4, 5)),
    "addmm_beta_zero": (lambda b, x, y: torch.addmm(b, x, y, beta=0), (5,), (3, 4), (4, 5)),
    "baddbmm": (torch.baddbmm, (2, 3, 5), (2, 3, 4), (2, 4, 5)),
    "tensordot": (lambda x, y: torch.tensordot(x, y, 1), (2, 3, 4), (4, 5)),
    "tensordot_dims": (
        lambda x, y: torch.tensordot(x, y, ([2, -2], [0, 2])), (2, 3, 4), (4, 5, 3)
    ),
    "einsum": (lambda x, y: torch.einsum("bmd,hdr->bhmr", x, y), (2, 3, 4), (6, 4, 5)),
    "einsum_ellipsis": (lambda x, y: torch.einsum("...d,dr->...r", x, y), (2, 3, 4), (4, 5)),
    "einsum_two_contracted": (
        lambda x, y: torch.einsum("bmhd,hdo->bmo", x, y), (2, 3, 4, 5), (4, 5, 6)
    ),
    "einsum_implicit": (lambda x, y: torch.einsum("ij,jk", x, y), (3, 4), (4, 5)),
    "einsum_spaces": (lambda x, y: torch.einsum("i j, j k -> k i", x, y), (3, 4), (4, 5)),
}  # fmt: skip

NOT_READ = {
    "vector": (torch.matmul, (3, 4), (4,)),
    "addmm_beta": (lambda b, x, y: torch.addmm(b, x, y, beta=2), (5,), (3, 4), (4, 5)),
    "einsum_diagonal": (lambda x, y: torch.einsum("ii,ik->ik", x, y), (4, 4), (4, 5)),
    "einsum_lonely_sum": (lambda x, y: torch.einsum("ijl,jk->ik", x, y), (3, 4, 2), (4, 5)),
    "einsum_length_one_summed": (lambda x, y: torch.einsum("ij,jk->ik", x, y), (3, 1), (4, 5)),
    "einsum_of_one": (lambda x: torch.einsum("ij->ji", x), (3, 4)),
    "outer_sum": (torch.add, (3, 4), (3, 4)),
}


def _traced(function, shapes):
    """The trace, the node of its result, and the inputs; their order is the shapes'."""
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    mode = FakeTensorMode()
    with mode:
        module = make_fx(lambda *args: function(*args), pre_dispatch=True)(
            *(mode.from_tensor(tensor) for tensor in inputs)
        )
    return module, module.graph.find_nodes(op="output")[0].args[0], inputs


@pytest.mark.parametrize("name", READ)
def test_read_as_an_einsum(name):
    function, *shapes = READ[name]
    module, node, inputs = _traced(function, shapes)
    found = read_contraction(node)
    assert found is not None
    by_node = dict(zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True))
    letters = dict.fromkeys((*found.left_letters, *found.right_letters))
    names = dict(zip(letters, string.ascii_letters, strict=False))
    left, right, out = (
        "".join(names[c] for c in word)
        for word in (found.left_letters, found.right_letters, found.out_letters)
    )
    said = torch.einsum(f"{left},{right}->{out}", by_node[found.left], by_node[found.right])
    said = said * found.scale + (0 if found.bias is None else by_node[found.bias])
    torch.testing.assert_close(said, function(*inputs))


@pytest.mark.parametrize("name", NOT_READ)
def test_not_read(name):
    function, *shapes = NOT_READ[name]
    _, node, _ = _traced(function, shapes)
    assert read_contraction(node) is None
