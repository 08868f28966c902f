"""What a graph holds at each of its operators that write memory: the numbers behind the picture."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import fx

from flashsvd_compile.analysis.axes import Size
from flashsvd_compile.memory.liveness import MemoryProfile, Moment


@dataclass(frozen=True)
class Step:
    """While ``node`` runs: ``transient_bytes``, and ``returned_bytes`` of what the graph returns.

    ``site``: the kind of the site that the node belongs to, or None.
    """

    node: str
    transient_bytes: int
    returned_bytes: int
    site: str | None

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-ready values."""
        return dict(vars(self))


@dataclass(frozen=True)
class Timelines:
    """The steps of one graph untouched, and rewritten; in the order in which they run."""

    before: tuple[Step, ...]
    after: tuple[Step, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-ready values."""
        return {
            "before": [step.to_dict() for step in self.before],
            "after": [step.to_dict() for step in self.after],
        }


def steps_of(
    profile: MemoryProfile, at: Callable[[Size], float], site_of: Mapping[fx.Node, str]
) -> tuple[Step, ...]:
    """The moments of ``profile`` at the sizes that ``at`` puts in; ``site_of``: kinds by node."""
    known = cache(at)  # the same few sizes are held at most moments

    def step(moment: Moment) -> Step:
        sizes = {node: known(size) for node, size in moment.held.items()}
        returned = sum(size for node, size in sizes.items() if node in moment.returned)
        transient = known(moment.scratch_bytes) + sum(sizes.values()) - returned
        site = site_of.get(moment.node)
        return Step(moment.node.name, round(transient), round(returned), site)

    return tuple(step(moment) for moment in profile.moments)


def most_transient(steps: tuple[Step, ...]) -> int:
    """The most transient bytes of all steps."""
    return max((step.transient_bytes for step in steps), default=0)


def most_total(steps: tuple[Step, ...]) -> int:
    """The most bytes of all steps, returned ones included."""
    return max((step.transient_bytes + step.returned_bytes for step in steps), default=0)
