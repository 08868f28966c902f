"""The worst moment of a run, as people and budgets read it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flashsvd_compile.analysis.axes import Size
from flashsvd_compile.memory.liveness import MemoryProfile
from flashsvd_compile.reason import module_path

# Of what is held, so many are named.
MOST_NAMED = 5


@dataclass(frozen=True)
class Peak:
    """What one graph holds at most, as predicted.

    ``transient_bytes``: beyond its inputs and outputs; ``total_bytes``: its outputs included, which
    may be at another moment. ``node``, ``where``: the operator then at work and its module path.
    ``held``: bytes by the node that made them, the largest first, ``"scratch"`` for what the
    operator takes for itself. ``formula``: of the transient bytes for any sizes.
    """

    transient_bytes: int
    total_bytes: int
    node: str
    where: str
    held: Mapping[str, int]
    formula: str

    def __str__(self) -> str:
        held = ", ".join(f"{name} {mib(size)}" for name, size in self.held.items())
        place = f"{self.node} in {self.where}" if self.where else self.node
        return f"{mib(self.transient_bytes)}, at {place}: {held}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "transient_bytes": self.transient_bytes,
            "total_bytes": self.total_bytes,
            "node": self.node,
            "where": self.where,
            "held": dict(self.held),
            "formula": self.formula,
        }


def peak_of(profile: MemoryProfile, at: Callable[[Size], float]) -> Peak:
    """The worst moment of ``profile`` at the sizes that ``at`` puts in."""
    moment, transient = profile.peak(at)
    if moment is None:
        return Peak(0, 0, "", "", {}, "0")
    sizes = {n.name: round(at(s)) for n, s in moment.held.items() if n not in moment.returned}
    sizes["scratch"] = round(at(moment.scratch_bytes))
    largest = sorted(sizes, key=lambda name: -sizes[name])[:MOST_NAMED]
    return Peak(
        transient,
        profile.peak_total_bytes(at),
        moment.node.name,
        module_path(moment.node),
        {name: sizes[name] for name in largest if sizes[name]},
        str(profile.peak_formula),
    )


def mib(size: float) -> str:
    return f"{size / 2**20:.2f} MiB"
