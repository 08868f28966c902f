"""Normalising changes no result, no compile count, no order of side effects, on many a graph."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    StaticCache,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from flashsvd_compile.analysis.calls import is_aten
from flashsvd_compile.normalize import normalize


class Normalized:
    """A backend that runs the normalised graph eagerly and keeps it."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm, example_inputs):
        code = gm.code
        traced = normalize(gm, example_inputs)
        assert gm.code == code, "the given graph was changed"
        traced.graph.lint()
        self.graphs.append(traced)
        return traced.forward

    @property
    def targets(self) -> list[str]:
        return [str(n.target) for g in self.graphs for n in g.graph.nodes]


pytestmark = pytest.mark.usefixtures("fresh")


def compiled(model, dynamic=None):
    backend = Normalized()
    return torch.compile(model, backend=backend, dynamic=dynamic), backend


def assert_same(got, expected):
    """Bit for bit: the same operators run in the same order."""
    got, expected = pytree.tree_leaves(got), pytree.tree_leaves(expected)
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert type(one) is type(other)
        if not isinstance(other, Tensor):
            assert one == other
            continue
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        assert one.requires_grad == other.requires_grad
        assert one.stride() == other.stride()


# ---- models -------------------------------------------------------------------------------------

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def _bert(attention):
    return BertModel(BertConfig(vocab_size=50, attn_implementation=attention, **_SIZES))


def _gpt2(attention):
    return GPT2Model(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, attn_implementation=attention)
    )


def _llama(attention):
    return LlamaModel(
        LlamaConfig(
            vocab_size=50, num_key_value_heads=2, attn_implementation=attention, **_SIZES
        )
    )  # fmt: skip


def _vit(attention):
    return ViTModel(
        ViTConfig(image_size=16, patch_size=4, attn_implementation=attention, **_SIZES)
    )  # fmt: skip


def _t5(attention):
    return T5Model(
        T5Config(
            vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
            attn_implementation=attention,
        )
    )  # fmt: skip


def _text(batch, rows):
    mask = torch.ones(batch, rows, dtype=torch.long)
    mask[-1, rows - 2 :] = 0
    return {"input_ids": torch.randint(0, 50, (batch, rows)), "attention_mask": mask}


def _text_to_text(batch, rows):
    return _text(batch, rows) | {"decoder_input_ids": torch.randint(0, 50, (batch, rows + 1))}


def _image(batch, rows):
    return {"pixel_values": torch.randn(batch, 3, 16, 16)}


MODELS = {
    "bert": (_bert, _text),
    "gpt2": (_gpt2, _text),
    "llama": (_llama, _text),
    "vit": (_vit, _image),
    "t5": (_t5, _text_to_text),
}


def _hidden(output) -> Tensor:
    return output.last_hidden_state


@pytest.mark.parametrize(
    ("attention", "dynamic", "graphs"),
    [("sdpa", None, 2), ("eager", True, 1)],
    ids=["sdpa-automatic", "eager-dynamic"],
)
@pytest.mark.parametrize("name", MODELS)
def test_models_at_several_sizes(name, attention, dynamic, graphs):
    make, inputs = MODELS[name]
    model = make(attention).eval()
    run, backend = compiled(model, dynamic)
    with torch.no_grad():
        for batch, rows in ((2, 5), (3, 7), (4, 9)):
            given = inputs(batch, rows)
            assert_same(_hidden(run(**given)), _hidden(model(**given)))
    assert len(backend.graphs) == graphs
    assert any("aten.linear" in t or "aten.addmm" in t for t in backend.targets)
    assert any("scaled_dot_product" in t for t in backend.targets) == (attention == "sdpa")


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_models_train(name):
    make, inputs = MODELS[name]
    model = make("sdpa").eval()
    run, backend = compiled(model)
    given = inputs(2, 5)
    grads = []
    for forward in (run, model):
        model.zero_grad()
        _hidden(forward(**given)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert_same(*grads)
    assert len(backend.graphs) == 1


def test_static_cache_is_updated_in_place():
    model = _llama("sdpa").eval()
    run, backend = compiled(model)
    # transformers leaves out a mask that hides nothing, but not where it is traced: SDPA then
    # runs on other paths than in the plain model, and rounds otherwise.
    traced = torch.compile(model, backend="eager")
    outputs = []
    with torch.no_grad():
        for forward in (run, traced):
            torch.manual_seed(1)
            cache = StaticCache(config=model.config, max_cache_len=12)
            results = []
            for start, rows in ((0, 4), (4, 1), (5, 1)):
                positions = torch.arange(start, start + rows)
                output = forward(
                    input_ids=torch.randint(0, 50, (2, rows)),
                    position_ids=positions[None],
                    past_key_values=cache,
                )
                results.append(_hidden(output))
            outputs.append([*results, cache.layers[0].keys, cache.layers[0].values])
    assert_same(*outputs)
    assert any("copy_" in target for target in backend.targets)


# ---- spellings that a graph may hold ------------------------------------------------------------


class Body(nn.Module):
    """Weights and a buffer for a forward given as a function."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.body = forward
        self.linear = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.buffer = nn.Buffer(torch.zeros(5, 16))

    def forward(self, *args):
        return self.body(self, *args)


class _Triple(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 3

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


def _writes_buffers(self, x):
    self.buffer.copy_(self.linear(x))
    before = self.buffer * 2
    self.buffer.add_(1.0)
    self.buffer.index_copy_(0, torch.tensor([1, 3]), before[:2])
    self.buffer[4] = 7
    return before + self.buffer, self.buffer[0]


def _aliases(self, x):
    x.add_(1)
    return x, x.view(-1), x[1:], None, 3, x.shape[0], self.linear(x)


def _no_grad_inside(self, x):
    with torch.no_grad():
        y = self.linear(x)
    return self.linear(x + y), y


def _enable_grad_inside(self, x):
    with torch.enable_grad():
        y = self.linear(x)
    return y * 2


def _autocast_inside(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = self.linear(x)
        with torch.autocast("cpu", enabled=False):
            z = self.linear(y.float())
        w = self.linear(z)
    return self.linear(w.float()), y, z, w


def _checkpointed(self, x):
    return self.linear(checkpoint(self.linear, x, use_reentrant=False))


def _flex(self, x):
    q = self.linear(x).view(1, -1, 2, 8).transpose(1, 2)
    rows = q.size(2)
    mask = create_block_mask(lambda b, h, i, j: i >= j, 1, 1, rows, rows, device="cpu")
    return self.linear(flex_attention(q, q, q, block_mask=mask).transpose(1, 2).flatten(2))


def _vmapped(self, x):
    return torch.vmap(lambda row: self.linear(row) * x[0])(x)


def _grad_of_vmap(self, x):
    return torch.func.grad(lambda y: torch.vmap(lambda row: row.sin() * x[0])(y).sum())(x)


def _cond(self, x):
    return torch.cond(x.sum() > 0, lambda y: self.linear(y), lambda y: y - 1, (x,))


def _slices_by_int(self, x, n):
    return self.linear(x)[:n] * n, n + 1


def _broken(self, x):
    y = self.linear(x)
    torch._dynamo.graph_break()
    return self.linear(y)


def _constants(self, x):
    scale = torch.tensor([1.0, float("inf"), -2.0, float("nan")], dtype=torch.float64)
    picks = torch.tensor([[True, False]])
    return self.linear(x) * scale.repeat(4), picks.repeat(3, 8), torch.tensor(2**40)


def _data_dependent(self, x):
    return self.linear(x)[x[:, 0] > 0]


CASES = {
    "writes_buffers": _writes_buffers,
    "aliases": _aliases,
    "no_grad": _no_grad_inside,
    "enable_grad": _enable_grad_inside,
    "autocast": _autocast_inside,
    "checkpoint": _checkpointed,
    "vmap": _vmapped,
    "grad_of_vmap": _grad_of_vmap,
    "cond": _cond,
    "constants": _constants,
    "data_dependent": _data_dependent,
    "strided": lambda self, x: self.linear(x.t().contiguous().t()).t(),
    "custom_autograd": lambda self, x: _Triple.apply(self.linear(x)),
    "detached": lambda self, x: (self.linear(x).detach(), self.linear(x)),
}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
@pytest.mark.parametrize("name", CASES)
def test_spellings(name, grad):
    if name in ("writes_buffers", "aliases"):
        grad = False  # eager itself cannot write into what requires a gradient
    outputs = []
    x = torch.randn(5, 16)
    model = Body(CASES[name])
    run, backend = compiled(model)
    for forward in (run, model):
        model.buffer.zero_()
        with torch.set_grad_enabled(grad):
            given = x.clone()
            outputs.append([forward(given), forward(given), given, model.buffer.clone()])
    assert_same(*outputs)
    assert len(backend.graphs) == 1


def test_an_ambient_autocast_sets_the_traced_dtypes():
    model = Body(lambda self, x: self.linear(x))
    run, backend = compiled(model)
    x = torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(run(x), model(x))
    (graph,) = backend.graphs
    linears = [n for n in graph.graph.nodes if "aten.linear" in str(n.target)]
    assert [n.meta["val"].dtype for n in linears] == [torch.bfloat16] * 2


def test_autocast_regions_set_the_traced_dtypes():
    run, backend = compiled(Body(_autocast_inside))
    run(torch.randn(5, 16))
    (graph,) = backend.graphs
    linears = [n for n in graph.graph.nodes if "aten.linear" in str(n.target)]
    half, full = torch.bfloat16, torch.float32
    assert [n.meta["val"].dtype for n in linears] == [half] * 2 + [full] * 2 + [half] * 2 + [
        full
    ] * 2


def test_flex_attention_and_its_mask_pass_through():
    model = Body(_flex)
    run, backend = compiled(model)
    x = torch.randn(1, 40, 16)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))
    assert "flex_attention" in backend.targets
    assert not any("empty_strided" in t for t in backend.targets), "stand-ins were traced"
    assert backend.targets.count("aten.linear.default") == 4


def test_graphs_after_a_break():
    model = Body(_broken)
    run, backend = compiled(model)
    x = torch.randn(5, 16)
    assert_same(run(x), model(x))
    assert len(backend.graphs) == 2


@pytest.mark.parametrize(
    ("dynamic", "calls", "graphs"),
    [(None, [(9, 3), (9, 4), (9, 5)], 2), (True, [(9, 3), (8, 4), (7, 5)], 1)],
    ids=["automatic", "dynamic"],
)
def test_symbolic_integers(dynamic, calls, graphs):
    model = Body(_slices_by_int)
    run, backend = compiled(model, dynamic)
    for rows, n in calls:
        x = torch.randn(rows, 16)
        assert_same(run(x, n), model(x, n))
    assert len(backend.graphs) == graphs


def test_aliases_with_dynamic_sizes():
    model = Body(_aliases)
    run, backend = compiled(model, dynamic=True)
    with torch.no_grad():
        for rows in (5, 6, 7):
            x = torch.randn(rows, 16)
            assert_same(run(x.clone()), model(x.clone()))
    assert len(backend.graphs) == 1


# ---- the graph ----------------------------------------------------------------------------------


def test_one_spelling():
    def spelled(x, w, b):
        return (
            F.linear(x, w, b),
            x @ w.T + b,
            torch.matmul(x, w.t()),
            x.matmul(w.mT),
            x.mm(w.T),
            nn.functional.gelu(x),
        )

    run, backend = compiled(spelled)
    run(torch.randn(3, 4), torch.randn(5, 4), torch.randn(5))
    nodes = list(backend.graphs[0].graph.nodes)
    assert all(is_aten(n) for n in nodes if n.op == "call_function")
    assert {n.op for n in nodes} == {"placeholder", "call_function", "output"}
    assert all(isinstance(n.meta["val"], Tensor) for n in nodes if n.op == "call_function")


def test_constants_are_code():
    """Attributes would collide in AOTAutograd's cache, which does not hash their values."""
    run, backend = compiled(lambda x: x * torch.tensor([1.5, 2.5]) + torch.tensor(3))
    run(torch.randn(2))
    (graph,) = backend.graphs
    assert not graph.graph.find_nodes(op="get_attr")
    assert not [*graph.named_buffers(), *graph.named_parameters()]
    assert "[1.5, 2.5]" in graph.code


def test_nodes_keep_their_module_and_source_line():
    run, backend = compiled(Body(_checkpointed))
    run(torch.randn(5, 16))
    linears = [n for n in backend.graphs[0].graph.nodes if "aten.linear" in str(n.target)]
    assert all(n.meta["nn_module_stack"] and n.meta["stack_trace"] for n in linears)


def test_a_graph_that_owns_its_weights_is_refused():
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(NotImplementedError, match=r"0\.weight"):
        normalize(gm, [torch.randn(1, 2)])
