"""Factors of one part of a model at a time, for weights that do not all fit into memory.

Where the model's weights are views of mapped files, a part's pages are read when it is run or
factored, and the system may drop them after: what is held is the moments of one block, what every
batch's next block reads, and factors until they are written.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flashsvd_compile.compress.blocks import find_blocks
from flashsvd_compile.compress.fitting import Fitted, factored
from flashsvd_compile.compress.matrices import Matrices
from flashsvd_compile.compress.methods import METHODS, Method, why_dead
from flashsvd_compile.compress.moments import (
    Moments,
    RealTokens,
    Watched,
    collect,
    in_evaluation,
    mask_of,
    watching,
)

# Those that differentiate nothing: a gradient goes through the whole model.
STREAMED = tuple(name for name, wants in METHODS.items() if wants <= {"inputs"})


def streamed(
    model: nn.Module,
    name: str,
    matrices: Mapping[str, Matrices],
    keep: float,
    batches: Sequence[Any],
    caps: Mapping[str, int],
) -> Iterator[tuple[str, Fitted | str]]:
    """By path what takes a linear's place, or why it stays, as soon as it is known.

    ``name``: one of `STREAMED`. Once a linear came, its place may be taken and its weight be gone.

    Raises ValueError for weights that are not finite, and where calibration is wanted and the
    model has no blocks that are called one after another.
    """
    ranks = Method(name, {}, caps).ranks(matrices, keep)
    wants = METHODS[name]
    alone = {path: one for path, one in matrices.items() if len(one.linear.paths) == 1}
    if wants:
        for path in matrices.keys() - alone.keys():
            yield path, "it is called in several places, which are not calibrated together"
    parts = _watched(model, wants, alone, batches) if wants else _each(matrices)
    for part in parts:
        how = Method(name, part, caps)
        for path, moments in part.items():
            matrices[path].validate()
            dead = why_dead(moments, wants) if wants else ""
            yield path, dead or factored(how, path, matrices[path], ranks[path])


def _each(matrices: Mapping[str, Matrices]) -> Iterator[dict[str, Moments]]:
    for path in matrices:
        yield {path: Moments()}


@torch.no_grad()
def _watched(
    model: nn.Module,
    wants: frozenset[str],
    matrices: Mapping[str, Matrices],
    batches: Sequence[Any],
) -> Iterator[dict[str, Moments]]:
    """Moments of what lies outside of the blocks, then of block after block."""

    def watched(paths: Sequence[str]) -> dict[str, Watched]:
        rows = {path: (*matrices[path].lead, matrices[path].shape[0]) for path in paths}
        return {path: Watched(matrices[path].linear.module, rows[path], wants) for path in paths}

    def moments(found: Mapping[str, Watched]) -> dict[str, Moments]:
        return {path: one.moments for path, one in found.items()}

    with in_evaluation(model):
        blocks = find_blocks(model, matrices, batches)
        if blocks is None:
            raise ValueError(
                f"{type(model).__name__} has no blocks that are called one after another, so that "
                "it cannot be calibrated in parts: load it, and pass it to compress_"
            )
        held = [[p for p in matrices if p.startswith(f"{block}.")] for block in blocks.paths]
        within = {path for paths in held for path in paths}
        if outside := watched([path for path in matrices if path not in within]):
            collect(model, list(outside.values()), batches, None, 0)
            yield moments(outside)
        hidden, real = list(blocks.hidden), RealTokens()
        for index, paths in enumerate(held):
            inside = watched(paths)
            with watching(inside.values(), real):
                for number, batch in enumerate(batches):
                    real.mask = mask_of(batch)
                    hidden[number] = blocks.run(index, number, hidden[number])
            yield moments(inside)
