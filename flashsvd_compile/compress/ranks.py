"""Ranks of all layers from one list: whatever saves most of the loss for its bytes comes first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

# Kernels pad ranks to tiles: finer steps cost as much as these.
RANK_STEP = 8

_Choice = tuple[float, int, int | None]  # what is lost, bytes, rank


@dataclass(frozen=True)
class Layer:
    """What a layer loses at each rank.

    ``losses[r]``: what is lost at rank r, r from 0; ``rank_bytes``: of one rank more;
    ``dense_bytes``: of the matrix, which loses nothing; ``cap``: the largest rank that it may have,
    if there is one.
    """

    losses: Sequence[float]
    rank_bytes: int
    dense_bytes: int
    cap: int | None = None


def plan_ranks(layers: Mapping[str, Layer], budget_bytes: int) -> dict[str, int | None]:
    """The rank of each layer, None where the matrix stays; together within ``budget_bytes``.

    Raises ValueError where the smallest ranks are already beyond it.
    """
    choices = {name: _choices(layer) for name, layer in layers.items()}
    taken = {name: own[0] for name, own in choices.items()}
    room = budget_bytes - sum(choice[1] for choice in taken.values())
    if room < 0:
        raise ValueError(
            f"the smallest ranks take {budget_bytes - room} bytes, more than {budget_bytes}"
        )
    hulls = {name: _hull(own) for name, own in choices.items()}
    steps = sorted(
        (-_saving(before, after), name, index)
        for name, own in hulls.items()
        for index, (before, after) in enumerate(pairwise(own), 1)
    )
    full = set()
    for _, name, index in steps:
        after = hulls[name][index]
        more = after[1] - taken[name][1]
        if name in full or more > room:
            full.add(name)  # its later steps begin at the one that does not fit
        else:
            taken[name], room = after, room - more
    return {name: choice[2] for name, choice in _filled(taken, choices, room).items()}


def share_within(budget: int, whole: int, own: int, rest: str) -> float:
    """Of the ``own`` bytes that may be cut, the share that lets all ``whole`` fit ``budget``; at
    most 1. Raises ValueError where the others, called ``rest``, leave nothing."""
    others = whole - own
    if not own or budget <= others:
        raise ValueError(
            f"weight_budget is {budget} bytes, and {rest} takes {others}; the model has {whole}"
        )
    return min(1.0, (budget - others) / own)


def _filled(
    taken: Mapping[str, _Choice], choices: Mapping[str, Sequence[_Choice]], room: int
) -> dict[str, _Choice]:
    """With what still fits into ``room``, the best for its bytes first."""
    found = dict(taken)
    while True:
        better = [
            (_saving(found[name], choice), name, choice)
            for name, own in choices.items()
            for choice in own
            if 0 < choice[1] - found[name][1] <= room and choice[0] < found[name][0]
        ]
        if not better:
            return found
        _, name, choice = max(better, key=lambda one: one[:2])
        room -= choice[1] - found[name][1]
        found[name] = choice


def _choices(layer: Layer) -> list[_Choice]:
    most = len(layer.losses) - 1
    # A small matrix, such as a head's, still has four ranks to choose from.
    step = max(1, min(RANK_STEP, most // 4))
    # Below one step as few as there is room for.
    ranks = [*(rank for rank in (1, 2, 4) if rank < step), *range(step, most + 1, step)]
    found: list[_Choice] = [
        (layer.losses[rank], rank * layer.rank_bytes, rank)
        for rank in ranks
        if rank * layer.rank_bytes < layer.dense_bytes and rank <= (layer.cap or rank)
    ]
    return [*found, (0.0, layer.dense_bytes, None)]


def _hull(choices: list[_Choice]) -> list[_Choice]:
    """Those that no mixture of others beats: each step saves less for its bytes than the last."""
    kept: list[_Choice] = []
    for choice in choices:
        while len(kept) > 1 and _saving(kept[-2], kept[-1]) < _saving(kept[-1], choice):
            kept.pop()
        kept.append(choice)
    return kept


def _saving(before: _Choice, after: _Choice) -> float:
    return (before[0] - after[0]) / (after[1] - before[1])
