"""What a row of a bench has to reach, and whether it did.

A target is a ratio of times, baseline over ours, or of bytes held, ours over the baseline.
Where several baselines are named the fastest one that ran counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

AGREEMENT = 1.03  # two runs that differ by more were disturbed: neither is a figure


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
    """One target's outcome: the ``ratio`` of ``what``, and the bound that it had to keep.

    ``resolution`` is what two measurements of one thing differ by: no ratio nearer to 1 than that
    says that either side is slower, so that it keeps a bound of "no slower", ≥ 1.
    """

    what: str
    ratio: float
    bound: Literal["≥", "≤"]
    asked: float
    resolution: float = 1.0

    @property
    def passed(self) -> bool:
        if self.bound == "≤":
            return self.ratio <= self.asked
        return self.ratio >= (1.0 / self.resolution if self.asked == 1.0 else self.asked)

    def __str__(self) -> str:
        outcome = "pass" if self.passed else "FAIL"
        told = f"{outcome}  {self.what}: {self.ratio:.3f}, asked {self.bound} {self.asked}"
        is_tie = self.passed and self.bound == "≥" and self.ratio < self.asked
        return f"{told}; two runs are {self.resolution:.3f} apart" if is_tie else told

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def verdicts(
    targets: Sequence[Target],
    milliseconds: Mapping[str, float],
    held_bytes: Mapping[str, int],
    apart: Mapping[str, float],
) -> list[Verdict]:
    """The outcome of each target; a ValueError names a contestant that did not run.

    ``apart`` tells how far two runs of each were apart: where one was disturbed, nothing is
    resolved by it, and a bound is kept to the letter.
    """
    outcomes = []
    for target in targets:
        ours, asked = target.ours, target.bytes_share
        ran = [name for name in target.baselines if name in milliseconds]
        if not ran or ours not in milliseconds:
            missing = ours if ran else " and ".join(target.baselines)
            raise ValueError(f"{missing} did not run, only {', '.join(milliseconds)}")
        fastest = min(ran, key=lambda name: milliseconds[name])
        ratio = milliseconds[fastest] / milliseconds[ours]
        widest = max(apart[fastest], apart[ours])
        outcomes.append(
            Verdict(
                f"time of {fastest} over {ours}",
                ratio,
                "≥",
                target.speedup,
                resolution=widest if widest <= AGREEMENT else 1.0,
            )
        )
        if asked is not None:
            share = held_bytes[ours] / min(held_bytes[name] for name in ran)
            outcomes.append(Verdict(f"bytes of {ours} over {' or '.join(ran)}", share, "≤", asked))
    return outcomes


def print_verdicts(outcomes: Sequence[Verdict]) -> list[dict[str, Any]]:
    """A line each; returns them as they go into the results."""
    for outcome in outcomes:
        print(f"  {outcome}", flush=True)
    return [outcome.to_dict() for outcome in outcomes]
