"""Which linear layers may be factored, why others may not, and patterns that choose."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from flashsvd_compile.compress.linears import find_linears, select


def model(**layers):
    return nn.ModuleDict(layers)


def obstacles(root):
    return {linear.path: linear.obstacle for linear in find_linears(root)}


def test_plain_linears_have_none():
    root = model(a=nn.Linear(4, 6), b=nn.Sequential(nn.ReLU(), nn.Linear(6, 2, bias=False)))
    assert obstacles(root) == {"a": "", "b.1": ""}


def test_conv1d_weight_is_read_transposed():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4)
    (linear,) = find_linears(model(a=conv1d))
    assert linear.weight.shape == (6, 4)
    assert linear.weight.data_ptr() == conv1d.weight.data_ptr()


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def quantised():
    linear = nn.Linear(4, 6)
    linear.weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.int8), requires_grad=False)
    return linear


def wrapped():
    linear = nn.Linear(4, 6)
    linear.forward = lambda x: x
    return linear


def with_buffer():
    linear = nn.Linear(4, 6)
    linear.register_buffer("scale", torch.ones(6))
    return linear


OBSTACLES = {
    "subclass": (lambda: Scaled(4, 6), "Scaled is not a plain linear"),
    "lazy": (lambda: nn.LazyLinear(6), "LazyLinear is not a plain linear"),
    "out_proj": (
        lambda: nn.MultiheadAttention(4, 2).out_proj,
        "NonDynamicallyQuantizableLinear is not a plain linear",
    ),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)),
        "its weight is parametrized",
    ),
    "pruned": (
        lambda: prune.l1_unstructured(nn.Linear(4, 6), "weight", 2),
        "its weight is computed from other tensors",
    ),
    "int8": (quantised, "its weight is int8"),
    "replaced forward": (wrapped, "its forward has been replaced"),
    "buffer": (with_buffer, "it holds more than a weight and a bias"),
    "empty": (lambda: nn.Linear(4, 0), "its weight is empty"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("make", "reason"), OBSTACLES.values(), ids=OBSTACLES)
def test_more_than_a_linear_is_an_obstacle(make, reason):
    root = model(a=make())
    assert obstacles(root) == {"a": reason}
    assert find_linears(root)[0].weight is None


def test_tied_output_embedding_names_the_embedding():
    root = model(embed=nn.Embedding(10, 4), head=nn.Linear(4, 10))
    root["head"].weight = root["embed"].weight
    assert obstacles(root) == {"head": "its weight is shared with embed"}


def test_linears_that_share_a_weight_name_each_other():
    root = model(a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4))
    root["b"].weight = root["a"].weight
    root["c"].weight = nn.Parameter(root["a"].weight.data)  # another object, the same memory
    assert obstacles(root) == {
        "a": "its weight is shared with b",
        "b": "its weight is shared with a",
        "c": "its weight is shared with a",
    }


def test_one_module_at_two_paths_is_one_linear():
    shared = nn.Linear(4, 6)
    (linear,) = find_linears(model(a=shared, b=nn.Sequential(shared)))
    assert linear.paths == ("a", "b.0")
    assert linear.obstacle == ""


ROOT = model(up=nn.Linear(4, 6), down=nn.Linear(6, 4), out=nn.Sequential(nn.Linear(4, 2)))


@pytest.mark.parametrize(
    ("include", "exclude", "left_out"),
    [
        (None, None, {}),
        (["up", "o*"], None, {"down": "not included"}),
        (None, ("*n",), {"down": "excluded"}),
        (["*"], iter(["out.0"]), {"out.0": "excluded"}),
        ([], None, {"up": "not included", "down": "not included", "out.0": "not included"}),
    ],
)
def test_patterns_choose(include, exclude, left_out):
    assert select(find_linears(ROOT), include, exclude) == left_out


@pytest.mark.parametrize("name", ["include", "exclude"])
def test_a_pattern_without_a_match_names_the_nearest_path(name):
    patterns = {"include": None, "exclude": None, name: ["up", "donw"]}
    with pytest.raises(ValueError, match=f"{name}: 'donw' matches no linear.*nearest is 'down'"):
        select(find_linears(ROOT), **patterns)


def test_patterns_must_be_a_list_of_strings():
    with pytest.raises(TypeError, match="include must be a list of patterns, got the string 'up'"):
        select(find_linears(ROOT), "up", None)
    with pytest.raises(TypeError, match="exclude must hold strings, got 3"):
        select(find_linears(ROOT), None, [3])
