"""What calibration tells of each linear layer: moments of its inputs, of gradients at its outputs.

Batches run through the model one by one, and only sums stay. Tokens that an ``attention_mask``
leaves out do not count. Without labels the gradient is that of the model's own output along random
directions, so that its moment is the Gauss–Newton metric of the output.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Any, Any], Tensor]


@dataclass
class Moments:
    """Sums over the tokens that a linear layer saw.

    ``inputs`` [in, in] of x xᵀ, ``outputs`` [lead.., m, m] of g gᵀ, split as the layer's matrices
    are, and ``fisher`` [in], of squared gradients of the weight by batches, over its outputs; None
    where not asked.
    """

    tokens: int = 0
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    fisher: Tensor | None = None


@dataclass
class Watched:
    """A linear layer, its weight's shape as [lead.., m], and what to sum up of it."""

    module: nn.Module
    rows: tuple[int, ...]
    wants: frozenset[str]
    moments: Moments = field(default_factory=Moments)


def collect(
    model: nn.Module,
    watched: Sequence[Watched],
    batches: Iterable[Any],
    loss: Loss | None,
    seed: int,
) -> int:
    """Run ``batches`` and fill the moments of ``watched``; returns how many there were.

    Parameters, gradients and the training flag are as before when this returns or raises. Raises
    ValueError where there is no batch, or the model's output holds nothing to differentiate.
    """
    needs_gradients = any(one.wants & {"outputs", "fisher"} for one in watched)
    real = RealTokens()
    count = 0
    with (
        in_evaluation(model),
        watching(watched, real, needs_gradients),
        torch.set_grad_enabled(needs_gradients),
    ):
        for count, batch in enumerate(batches, 1):
            real.mask = mask_of(batch)
            output = called(model, batch)
            if needs_gradients:
                _scalar(output, batch, loss, real, seed + count).backward()
    if not count:
        raise ValueError("calibration holds no batch")
    return count


@contextmanager
def watching(
    watched: Iterable[Watched], real: "RealTokens", needs_gradients: bool = False
) -> Iterator[None]:
    """Fill the moments of ``watched`` from what is run meanwhile, where tokens are ``real``."""
    with ExitStack() as stack:
        for one in watched:
            hook = one.module.register_forward_hook(_hook(one, real, needs_gradients))
            stack.callback(hook.remove)
        yield


class RealTokens:
    """Which tokens of the batch count; all where no mask fits."""

    def __init__(self, mask: Tensor | None = None) -> None:
        self.mask = mask

    def of(self, x: Tensor) -> Tensor:
        """``x`` [batch, tokens, features] as [real tokens, features]."""
        if self.mask is None or x.shape[:2] != self.mask.shape[:2] or self.mask.dim() != 2:
            return x.reshape(-1, x.shape[-1])
        return x[self.mask.to(x.device).bool()]


def _hook(one: Watched, real: RealTokens, needs_gradients: bool) -> Callable[..., Any]:
    def seen(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        with torch.no_grad():
            x = real.of(args[0].detach()).float()
        one.moments.tokens += len(x)
        if "inputs" in one.wants:
            one.moments.inputs = _plus(one.moments.inputs, x.T @ x)
        if not needs_gradients:
            return None
        if not out.requires_grad:  # the first of the model: gradients begin here
            out = out.detach().requires_grad_().clone()  # which the model may write into
        out.register_hook(lambda gradient: _seen_gradient(one, real, x, gradient))
        return out

    return seen


@torch.no_grad()
def _seen_gradient(one: Watched, real: RealTokens, x: Tensor, gradient: Tensor) -> None:
    g = real.of(gradient).float()
    if "outputs" in one.wants:
        parts = g.unflatten(-1, one.rows).movedim(0, -2)  # [lead.., tokens, m]
        one.moments.outputs = _plus(one.moments.outputs, parts.mT @ parts)
    if "fisher" in one.wants:
        one.moments.fisher = _plus(one.moments.fisher, (g.T @ x).square().sum(0))


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _scalar(output: Any, batch: Any, loss: Loss | None, real: RealTokens, seed: int) -> Tensor:
    """The loss, or the output along a random direction."""
    found = getattr(output, "loss", None) if loss is None else loss(output, batch)
    if found is None:
        found = first_tensor(output)
        if found.dim() > 2:  # of tokens
            found = real.of(found)
    if not found.requires_grad:
        raise ValueError("no linear layer that is to be factored has a part in the output or loss")
    if found.dim() == 0:
        return found
    generator = torch.Generator(found.device).manual_seed(seed)
    direction = torch.randn(found.shape, generator=generator, device=found.device)
    return (found.float() * direction).sum()


def first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    for value in values if isinstance(values, Iterable) else ():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ValueError(
        f"the model returns {type(output).__name__} without a tensor of numbers; pass a loss"
    )


def called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def mask_of(batch: Any) -> Tensor | None:
    """Which tokens of a batch are real, where it says so."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """No gradients of parameters, no dropout, no caches; afterwards as before."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    cached = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        for config in cached:
            config.use_cache = False
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        for config in cached:
            config.use_cache = True
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training
