"""What a row of a bench has to reach, and whether it did.

A target is a ratio of times, baseline over ours, or of bytes held, ours over the baseline.
Where several baselines are named the fastest one that ran counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Target:
    """``ours`` is at least ``speedup`` times as fast as the fastest of ``baselines``.

    With ``bytes_share``, the bytes it holds are at most that share of the baselines' fewest.
    """

    ours: str
    baselines: tuple[str, ...]
    speedup: float
    bytes_share: float | None = None


@dataclass(frozen=True)
class Verdict:
    """One target's outcome: the ``ratio`` of ``what``, and the bound that it had to keep."""

    what: str
    ratio: float
    bound: Literal["≥", "≤"]
    asked: float

    @property
    def passed(self) -> bool:
        return self.ratio >= self.asked if self.bound == "≥" else self.ratio <= self.asked

    def __str__(self) -> str:
        outcome = "pass" if self.passed else "FAIL"
        return f"{outcome}  {self.what}: {self.ratio:.3f}, asked {self.bound} {self.asked}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def verdicts(
    targets: Sequence[Target],
    milliseconds: Mapping[str, float],
    held_bytes: Mapping[str, int],
) -> list[Verdict]:
    """The outcome of each target; a ValueError names a contestant that did not run."""
    outcomes = []
    for target in targets:
        ours, asked = target.ours, target.bytes_share
        ran = [name for name in target.baselines if name in milliseconds]
        if not ran or ours not in milliseconds:
            missing = ours if ran else " and ".join(target.baselines)
            raise ValueError(f"{missing} did not run, only {', '.join(milliseconds)}")
        fastest = min(ran, key=lambda name: milliseconds[name])
        ratio = milliseconds[fastest] / milliseconds[ours]
        outcomes.append(Verdict(f"time of {fastest} over {ours}", ratio, "≥", target.speedup))
        if asked is not None:
            share = held_bytes[ours] / min(held_bytes[name] for name in ran)
            outcomes.append(Verdict(f"bytes of {ours} over {' or '.join(ran)}", share, "≤", asked))
    return outcomes


def print_verdicts(outcomes: Sequence[Verdict]) -> list[dict[str, Any]]:
    """A line each; returns them as they go into the results."""
    for outcome in outcomes:
        print(f"  {outcome}", flush=True)
    return [outcome.to_dict() for outcome in outcomes]
