"""Blocks refined one after another: what the dense rest of the model makes of each stays the same.

The closed form (``anchored.py``) sees a loss through moments of single tokens. What errors do
together, over the tokens of a sentence and through what is not linear, only the model itself tells.
So each block's factors are trained, by Adam, on what the compressed blocks before it give, with the
dense blocks behind it in place: the model's results shall be those of the dense model. No labels,
and never more than one block at a time.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd_compile.compress.anchored import Anchored
from flashsvd_compile.compress.blocks import Blocks
from flashsvd_compile.compress.moments import Loss, RealTokens, called, first_tensor, mask_of

log = logging.getLogger(__name__)

# Of a step, relative to the root mean square of each parameter: factors differ in scale.
RATE = 6e-4
EPOCHS = 2
WARM = 0.1  # of all steps, in which the rate rises; then it falls as a cosine
LEAST = 1e-2  # biases near zero move as if they were this large

_TINY = 1e-12


def refined(
    model: nn.Module,
    blocks: Blocks,
    anchored: Anchored,
    batches: Sequence[Any],
    loss: Loss | None,
    seed: int,
) -> Iterator[str]:
    """Trains the modules that ``anchored`` made, block by block; yields each block's path.

    ``model`` is dense and in evaluation, its parameters frozen, and so again between steps. A block
    whose results end further off than they began keeps its closed form.
    """
    results = _results_of(loss)
    dense = set(model.parameters())  # of which a made module may hold a bias: it is not ours
    with torch.no_grad():
        wanted = [results(called(model, batch), batch) for batch in batches]
    hidden = list(blocks.hidden)
    for index, path in enumerate(blocks.paths):
        with anchored.in_place(index):
            made = [m for p, m in anchored.made.items() if p.startswith(f"{path}.")]
            parameters = [p for module in made for p in module.parameters() if p not in dense]

            def off(batch: int, index: int = index, hidden: Sequence[Tensor] = hidden) -> Tensor:
                with _reading(blocks, index, batch, hidden[batch]):
                    output = called(model, batches[batch])
                gap = results(output, batches[batch]) - wanted[batch]
                return gap.square().sum() / max(1, len(gap))

            if parameters:
                _train(parameters, off, len(batches), seed + index, path)
            with torch.no_grad():
                hidden = [blocks.run(index, batch, x) for batch, x in enumerate(hidden)]
        yield path


def _results_of(loss: Loss | None) -> Callable[[Any, Any], Tensor]:
    """What shall stay as it is: as `compress_` is told, else the output's first tensor. Of a scalar
    loss, too, as that says little about a batch."""

    def results(output: Any, batch: Any) -> Tensor:
        found = None if loss is None else loss(output, batch)
        if found is None or found.dim() == 0:
            found = first_tensor(output)
        real = RealTokens(mask_of(batch))
        return real.of(found) if found.dim() > 2 else found

    return results


@contextmanager
def _reading(blocks: Blocks, index: int, batch: int, hidden: Tensor) -> Iterator[None]:
    """The block reads ``hidden``, whatever those before it made."""

    def given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        at = blocks.calls[batch][index].at
        if isinstance(at, str):
            return args, {**kwargs, at: hidden}
        return (*args[:at], hidden, *args[at + 1 :]), kwargs

    hook = blocks.modules[index].register_forward_pre_hook(given, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _train(
    parameters: Sequence[nn.Parameter],
    off: Callable[[int], Tensor],
    batches: int,
    seed: int,
    path: str,
) -> None:
    """Adam over all batches, `EPOCHS` times in random orders; nothing where it does not help."""
    flags = [p.requires_grad for p in parameters]
    start = [p.detach().clone() for p in parameters]
    before = _mean(off, batches)
    if not before > _TINY:
        return
    rates = [RATE * max(LEAST, float(p.square().mean().sqrt())) for p in start]
    try:
        for p in parameters:
            p.requires_grad_(True)
        groups = [{"params": [p], "lr": r} for p, r in zip(parameters, rates, strict=True)]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _share(EPOCHS * batches))
        generator = torch.Generator().manual_seed(seed)
        with torch.enable_grad():
            for _ in range(EPOCHS):
                for batch in torch.randperm(batches, generator=generator).tolist():
                    (off(batch) / before).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
    finally:
        for p, flag in zip(parameters, flags, strict=True):
            p.grad = None
            p.requires_grad_(flag)
    after = _mean(off, batches)
    log.info("%s: results are off by %.3g of what they were before", path, after / before)
    if not after < before:
        for p, value in zip(parameters, start, strict=True):
            p.data.copy_(value)


def _share(steps: int) -> Callable[[int], float]:
    def share(step: int) -> float:
        done = step / steps
        if done < WARM:
            return (step + 1) / (WARM * steps + 1)
        return 0.5 * (1 + math.cos(math.pi * (done - WARM) / (1 - WARM)))

    return share


@torch.no_grad()
def _mean(off: Callable[[int], Tensor], batches: int) -> float:
    return sum(float(off(batch)) for batch in range(batches)) / batches
