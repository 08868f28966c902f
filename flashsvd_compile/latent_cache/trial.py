"""A trial run of a model on a few tokens, which shows every attention at its update of a cache.

Names do not say how a model's keys come about; its own run does: which modules were called with
which tensors, and what was handed to the cache in the end.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd_compile.latent_cache.base import DynamicCache

# Enough positions to tell ways to rotate from each other, few enough to cost a step of decoding.
TOKENS = 8


@dataclass
class ModuleCall:
    """One call of a module, and those that it has made so far."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    calls: list["ModuleCall"] = field(default_factory=list)


@dataclass(frozen=True)
class Update:
    """What the innermost module of ``stack`` hands to layer ``layer_idx`` of the cache."""

    layer_idx: int
    stack: tuple[ModuleCall, ...]
    key_states: Tensor
    value_states: Tensor


@torch.no_grad()
def try_out(model: Any, config: Any, see: Callable[[Update], None]) -> Any:
    """Run ``model`` once on `TOKENS` tokens; ``see`` each update while its tensors are alive.

    ``config``: of the decoder within. Returns the dense cache that such a model has.
    """
    stack: list[ModuleCall] = []

    class _Watched(DynamicCache):
        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kw: Any
        ) -> tuple[Tensor, Tensor]:
            see(Update(layer_idx, tuple(stack), key_states, value_states))
            return super().update(key_states, value_states, layer_idx, *args, **kw)

    cache = _Watched(config=config)
    accepted = inspect.signature(type(model).forward).parameters
    name = "cache" if "cache" in accepted else "past_key_values"
    device = next(model.parameters()).device
    ids = torch.arange(TOKENS, device=device).unsqueeze(0) % config.vocab_size
    with (
        _followed(model, stack),
        torch.compiler.set_stance("force_eager"),
        torch.random.fork_rng(enabled=model.training),  # dropout draws
    ):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **{name: cache})
    return cache


@contextmanager
def _followed(model: nn.Module, stack: list[ModuleCall]) -> Iterator[None]:
    """Calls of all modules, on ``stack`` while they run."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack.append(ModuleCall(module, args, kwargs))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = stack.pop()
        call.output = output
        call.calls = []  # only what the modules around it see of it stays
        if stack:
            stack[-1].calls.append(call)

    handles: list[Any] = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()
