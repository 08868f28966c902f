"""Blocks trained one after another until the model's results are those of the dense model.

The closed form (``anchored.py``) sees a loss through moments of single tokens. What errors do
together, over the tokens of a sentence and through what is not linear, only the model itself tells.
So of one block at a time, the last first, the factors and their biases take steps (``descent.py``)
with all that was compressed in place, as far as batches that the closed form never saw are for it.
The last block costs the least and gains the most; the first that gains nothing is the end of it.
No labels; norms, embeddings and all else that was not factored stay as they are.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd_compile.compress.anchored import Anchored
from flashsvd_compile.compress.blocks import Blocks
from flashsvd_compile.compress.descent import descend
from flashsvd_compile.compress.moments import Loss, RealTokens, called, first_tensor, mask_of

log = logging.getLogger(__name__)

# Of all batches one in so many judges, and calibrates nothing else.
JUDGES = 5
SAME = 1e-3  # of results, when blocks in front are skipped: roundings of float32


def split(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Batches to calibrate with, and those that only judge; every fifth, and at least one.

    Raises ValueError where there are not two.
    """
    if len(batches) < 2:
        raise ValueError("refine=True needs two batches of calibration or more: some only judge")
    middle = min(JUDGES, len(batches)) // 2  # batches may be sorted by length
    judges = [batch for place, batch in enumerate(batches) if place % JUDGES == middle]
    return [x for place, x in enumerate(batches) if place % JUDGES != middle], judges


def refined(
    model: nn.Module,
    blocks: Blocks,
    anchored: Anchored,
    batches: Sequence[Any],
    judges: int,
    loss: Loss | None,
    seed: int,
) -> Iterator[str]:
    """Trains the modules that ``anchored`` made, block by block; yields each block's path. Ends
    with a block that gains nothing.

    ``blocks``: of ``batches``, of which the last ``judges`` judge. ``model`` is dense and in
    evaluation, its parameters frozen, and so again between steps; an interrupt leaves a block as
    its last step found it, and the model dense. Of activations, what one block reads in all batches
    is held, and of each batch the results.
    """
    results = _results_of(loss)
    trains = list(range(len(batches) - judges))
    judging = list(range(len(trains), len(batches)))
    with torch.no_grad():
        wanted = [results(called(model, batch), batch) for batch in batches]
    for index, path in reversed([*enumerate(blocks.paths)]):
        made = [module for p, module in anchored.made.items() if p.startswith(f"{path}.")]
        parameters = _own(model, made)
        if parameters:
            with ExitStack() as stack:
                for place in range(len(blocks.paths)):
                    stack.enter_context(anchored.in_place(place))
                hidden = _read_by(blocks, index)
                reading = _Reading(model, blocks, index, batches, results)

                def off(batch: int, reading: Any = reading, hidden: Any = hidden) -> Tensor:
                    gap = reading.results(batch, hidden[batch]) - wanted[batch]
                    return gap.float().square().sum() / max(1, len(gap))

                before, after = descend(parameters, off, trains, judging, seed + index)
            log.info("%s: results are off by %.4g, before by %.4g", path, after, before)
            if not after < before:
                return
        yield path


@torch.no_grad()
def _read_by(blocks: Blocks, index: int) -> list[Tensor]:
    """What the block reads, of each batch."""
    hidden = list(blocks.hidden)
    for place in range(index):
        hidden = [blocks.run(place, batch, x) for batch, x in enumerate(hidden)]
    return hidden


def _own(model: nn.Module, made: Sequence[nn.Module]) -> list[nn.Parameter]:
    """What factors hold for themselves: a bias may be the dense model's."""
    dense = set(model.parameters())
    return [p for module in made for p in module.parameters() if p not in dense]


def _results_of(loss: Loss | None) -> Callable[[Any, Any], Tensor]:
    """What shall stay as it is: as `compress_` is told, else the output's first tensor that is no
    scalar, in place of a loss that is one, too: it says little about a batch."""

    def results(output: Any, batch: Any) -> Tensor:
        found = None if loss is None else loss(output, batch)
        if found is None or found.dim() == 0:
            found = first_tensor(output, least_dims=1)
        return RealTokens(mask_of(batch)).of(found) if found.dim() > 2 else found

    return results


class _Reading:
    """The model's results where block ``index`` reads what it is given."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        index: int,
        batches: Sequence[Any],
        results: Callable[[Any, Any], Tensor],
    ) -> None:
        self._model, self._blocks, self._index = model, blocks, index
        self._batches, self._of = batches, results
        self._skips = False
        self._skips = self._may_skip()

    def results(self, batch: int, hidden: Tensor) -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(self._given(batch, hidden))
            if self._skips:
                stack.enter_context(_skipped(self._blocks.modules[: self._index], hidden))
            return self._of(called(self._model, self._batches[batch]), self._batches[batch])

    @torch.no_grad()
    def _may_skip(self) -> bool:
        """Whether nothing but the hidden state comes from the blocks in front, which need not run
        then: their dense outputs would be overwritten."""
        if not self._index:
            return False
        hidden = self._blocks.hidden[0]
        expected = self.results(0, hidden).double()
        self._skips = True
        try:
            found = self.results(0, hidden).double()
        except Exception as error:
            log.info("the blocks in front of %s run: %s", self._blocks.paths[self._index], error)
            return False
        return found.shape == expected.shape and bool(
            (found - expected).norm() <= SAME * expected.norm()
        )

    @contextmanager
    def _given(self, batch: int, hidden: Tensor) -> Iterator[None]:
        at = self._blocks.calls[batch][self._index].at

        def given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if isinstance(at, str):
                return args, {**kwargs, at: hidden}
            return (*args[:at], hidden, *args[at + 1 :]), kwargs

        block = self._blocks.modules[self._index]
        hook = block.register_forward_pre_hook(given, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


@contextmanager
def _skipped(modules: Sequence[nn.Module], hidden: Tensor) -> Iterator[None]:
    """Each of ``modules`` returns ``hidden``, whatever it is given."""
    own = [(module, vars(module).get("forward")) for module in modules]
    try:
        for module in modules:
            module.forward = lambda *args, **kwargs: hidden
        yield
    finally:
        for module, forward in own:
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward
