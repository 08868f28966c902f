"""Dynamo's graph → pre-dispatch ATen: one spelling for every operator.

Dynamo hands a backend a graph in the user's own spelling: ``x @ w``, ``torch.matmul``,
``x.matmul``, ``nn.functional.linear``. Tracing that graph once more *before* autograd and
autocast leaves whole ``aten.linear``, ``aten.scaled_dot_product_attention``, ``aten.gelu`` with
views between them, and nothing decomposed:

    before   matmul = x @ w;  y = torch.nn.functional.gelu(matmul)
    after    aten.matmul.default(x, w);  aten.gelu.default(matmul)

The traced graph keeps Dynamo's placeholders (order, sources, symbols), so it stands in for the
original wherever that one would have gone. In-place operators, autocast and ``no_grad`` regions
stay in order. Higher-order operators (checkpoint, flex attention) and everything inside a
``torch.func`` transform (vmap, grad; a flex block mask has some) are copied as they are.
Tensor constants are spelled as literals: the compilers' caches key on a graph's code, and hold a
tensor that is an attribute for equal to any other of its shape.
"""

import operator
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import (
    PythonKeyTracer,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree


def normalize(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Trace ``gm`` to pre-dispatch ATen; the given graph is left as it was.

    ``example_inputs`` are what Dynamo gave the backend (tensors, parameters, symbolic integers),
    one for each placeholder. Every node of the result that holds a tensor has its fake value in
    ``meta["val"]``, in the fake mode and with the symbols of the compile under way.

    Raises whatever tracing raises; the caller decides what to do without a normalised graph.
    """
    held = [name for name, _ in (*gm.named_parameters(), *gm.named_buffers())]
    if held:
        raise NotImplementedError(
            f"the graph holds {held[0]} itself instead of taking it as an input "
            "(torch._dynamo.config.inline_inbuilt_nn_modules is off)"
        )
    fake_mode, fakes = _fake_inputs(example_inputs)
    with _tracing(fake_mode):
        traced = make_fx(
            _Interpreter(gm).run,
            tracing_mode="real",
            pre_dispatch=True,
            _allow_non_fake_inputs=True,
        )(*fakes)
    _spell_constants(traced)
    _adopt_identity(gm, traced)
    return traced


class _Interpreter(fx.Interpreter):
    """Runs Dynamo's graph under the tracer, and copies what cannot be run there."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._transforms = 0
        self._autocasts: list[torch.autocast] = []

    def run_node(self, n: fx.Node) -> Any:
        with fx.traceback.set_current_meta(n):
            if n.op in ("placeholder", "get_attr", "output"):
                return super().run_node(n)
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if self._is_copied(n) and not _picks(n, args):
                return _copy_node(n, args, kwargs)
            if n.target is torch.amp.autocast_mode._enter_autocast:
                return self._enter_autocast(*args)
            if n.target is torch.amp.autocast_mode._exit_autocast:
                return self._autocasts.pop().__exit__(None, None, None)
            return super().run_node(n)

    def _is_copied(self, n: fx.Node) -> bool:
        """Is ``n`` a higher-order operator, or within a transform of ``torch.func``?"""
        inside = self._transforms > 0
        name = getattr(n.target, "__name__", "")
        if name.endswith("_increment_nesting"):
            self._transforms += 1
        elif name.endswith("_decrement_nesting"):
            self._transforms -= 1
        touched = inside or self._transforms > 0
        return touched or isinstance(n.target, torch._ops.HigherOrderOperator)

    def _enter_autocast(self, *args: Any) -> None:
        """The tracer only records a bare enter; the context sets what dtypes follow, too."""
        self._autocasts.append(torch.autocast(*args))
        self._autocasts[-1].__enter__()


def _picks(n: fx.Node, args: tuple[Any, ...]) -> bool:
    """Does ``n`` take an item out of a tuple, which needs no operator?"""
    return n.target is operator.getitem and not isinstance(args[0], torch.Tensor)


def _copy_node(n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record ``n`` as it stands; its outputs are fresh fakes shaped as Dynamo saw them."""
    mode = get_proxy_mode()
    if mode is None or not isinstance(mode.tracer, PythonKeyTracer):
        raise RuntimeError(f"no tracer is active to record {n.target}")
    tracer = mode.tracer

    def as_proxy(leaf: Any) -> Any:
        if isinstance(leaf, fx.GraphModule):
            return tracer.create_proxy("get_attr", _attach(tracer.root, leaf), (), {})
        return tracer.unwrap_proxy(leaf)

    proxy_args, proxy_kwargs = pytree.tree_map(as_proxy, (args, kwargs))
    proxy = tracer.create_proxy(n.op, n.target, proxy_args, proxy_kwargs, name=n.name)
    outputs = pytree.tree_map_only(torch.Tensor, _like, n.meta.get("example_value"))
    return track_tensor_tree(outputs, proxy, constant=None, tracer=tracer)


def _attach(root: torch.nn.Module, subgraph: fx.GraphModule) -> str:
    taken = {name for name, _ in root.named_children()}
    name = next(f"subgraph_{i}" for i in range(len(taken) + 1) if f"subgraph_{i}" not in taken)
    root.add_module(name, subgraph)
    return name


def _like(example: torch.Tensor) -> torch.Tensor:
    """A fake of the active mode with the example's size, strides, dtype and device; not traced."""
    mode = detect_fake_mode()
    assert mode is not None
    with torch.utils._python_dispatch._disable_current_modes():
        shape, stride = tuple(example.shape), example.stride()
        with mode:
            fake = torch.empty_strided(shape, stride, dtype=example.dtype, device=example.device)
    return fake.requires_grad_(example.requires_grad)


def _fake_inputs(example_inputs: Sequence[Any]) -> tuple[FakeTensorMode | None, list[Any]]:
    """Fakes of the compile's own fake mode, so that symbols and guards stay Dynamo's."""
    context = TracingContext.try_get()
    fake_mode = (context and context.fake_mode) or detect_fake_mode(example_inputs)
    if fake_mode is None:
        return None, list(example_inputs)

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        symbolic = context.tensor_to_context.get(value) if context else None
        if symbolic is None:
            return fake_mode.from_tensor(value, static_shapes=True)
        source = getattr(symbolic, "tensor_source", None)
        return fake_mode.from_tensor(value, symbolic_context=symbolic, source=source)

    return fake_mode, [fake(value) for value in example_inputs]


@contextmanager
def _tracing(fake_mode: FakeTensorMode | None):
    with ExitStack() as stack:
        stack.enter_context(preserve_node_meta())
        if fake_mode is not None:
            # Constants inside the model are real tensors and stay so.
            stack.enter_context(patch.object(fake_mode, "allow_non_fake_inputs", True))
            stack.enter_context(fake_mode)
        yield


def _spell_constants(traced: fx.GraphModule) -> None:
    """Replace tensors that the trace made attributes by operators that make them anew."""
    for node in traced.graph.find_nodes(op="get_attr"):
        constant = getattr(traced, node.target)
        if not isinstance(constant, torch.Tensor):
            continue
        if isinstance(constant, FakeTensor):
            raise RuntimeError(f"{node.target} is a tensor whose values the trace lost")
        options: dict[str, Any] = {"dtype": constant.dtype, "device": constant.device}
        with traced.graph.inserting_before(node):
            if constant.dim():
                new = traced.graph.call_function(torch.tensor, (constant.tolist(),), options)
            else:
                full = torch.ops.aten.full.default
                new = traced.graph.call_function(full, ([], constant.item()), options)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        traced.graph.erase_node(node)
        delattr(traced, node.target)


def _adopt_identity(gm: fx.GraphModule, traced: fx.GraphModule) -> None:
    """Give the traced graph what torch reads off a graph of Dynamo's: sources, names, meta."""
    originals = gm.graph.find_nodes(op="placeholder")
    for original, placeholder in zip(
        originals, traced.graph.find_nodes(op="placeholder"), strict=True
    ):
        for key, value in original.meta.items():
            placeholder.meta.setdefault(key, value)
        if hasattr(original, "_dynamo_source"):
            placeholder._dynamo_source = original._dynamo_source
    traced.meta.update(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        traced._param_name_to_source = gm._param_name_to_source
