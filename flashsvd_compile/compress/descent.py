"""A few parameters trained by Adam, and of all that they were, the best kept.

What is trained on cannot say when to stop: each pass over it is judged by what is not, the next
begins only where the last one was for the better, and what is worse than the start is not kept.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Of a step, relative to the root mean square of each parameter: factors differ in scale.
# all-MiniLM-L6-v2 at keep 0.7, its last block, 757 sentences: 6e-4 took mean |Δcos| of 256 others
# from 0.0249 to 0.0231 in two passes and no further in four, 2e-3 to 0.0240 (2026-11-28).
RATE = 6e-4
PASSES = 3
WARM = 0.1  # of all steps, in which the rate rises; then it falls as a cosine
LEAST = 1e-2  # parameters near zero move as if they were this large


class Judged(NamedTuple):
    """How far off, in the mean over the batches that judge, the start is and what was kept."""

    before: float
    after: float


def descend(
    parameters: Sequence[nn.Parameter],
    off: Callable[[int], Tensor],
    trains: Sequence[int],
    judges: Sequence[int],
    seed: int,
) -> Judged:
    """Train ``parameters`` in place so that ``off(batch)``, a scalar of at least 0, falls.

    ``trains`` and ``judges``: batches, at least one of each. ``seed``: of the order of batches.
    Parameters of 16 bits take their steps in 32. An error or an interrupt leaves them all as they
    were; ``requires_grad`` and ``grad`` always are as before.
    """
    before = mean(off, judges)
    if not 0 < before < math.inf:
        return Judged(before, before)
    kept = [p.detach().clone() for p in parameters]
    least = before
    adam = _Adam(parameters, PASSES * len(trains))
    generator = torch.Generator().manual_seed(seed)
    try:
        for _ in range(PASSES):
            start = [p.detach().clone() for p in parameters]
            for place in torch.randperm(len(trains), generator=generator).tolist():
                with _training(parameters):
                    (off(trains[place]) / before).backward()
                    adam.step()
            found = mean(off, judges)
            if not found < least:
                put(parameters, start)
                break
            least = found
    except BaseException:
        put(parameters, kept)
        raise
    return Judged(before, least)


@torch.no_grad()
def mean(off: Callable[[int], Tensor], batches: Sequence[int]) -> float:
    return sum(float(off(batch)) for batch in batches) / len(batches)


@torch.no_grad()
def put(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


class _Adam:
    """Over ``steps``, at rates relative to each parameter's size; in float32 at least."""

    def __init__(self, parameters: Sequence[nn.Parameter], steps: int) -> None:
        self._parameters = parameters
        self._precise = [
            p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for p in parameters
        ]
        sizes = [float(p.square().mean().sqrt()) for p in self._precise]
        groups = [
            {"params": [p], "lr": RATE * max(LEAST, size)}
            for p, size in zip(self._precise, sizes, strict=True)
        ]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: _share(step / steps)
        )

    def step(self) -> None:
        """By the gradients of the parameters; by none where one is not finite."""
        for p, precise in zip(self._parameters, self._precise, strict=True):
            precise.grad = None if p.grad is None else p.grad.to(precise.dtype)
        found = [p.grad for p in self._precise if p.grad is not None]
        if all(bool(torch.isfinite(grad).all()) for grad in found):
            self._optimizer.step()
            put(self._parameters, self._precise)
        self._schedule.step()


def _share(done: float) -> float:
    """Of the rate, when this share of the steps is done."""
    if done < WARM:
        return (done + 0.01) / (WARM + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - WARM) / (1 - WARM)))


@contextmanager
def _training(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients go to ``parameters``, for a step."""
    before = [(p, p.requires_grad, p.grad) for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
            p.grad = None
        with torch.enable_grad():
            yield
    finally:
        for p, flag, grad in before:
            p.grad = grad
            p.requires_grad_(flag)
