"""What a row of a bench has to reach, and whether it did.

A target is a ratio of times, baseline over ours, or of bytes held, ours over the baseline.
Where several baselines are named the fastest one that ran counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


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
    """One target's outcome: ``ratio`` measured, ``asked`` wanted, both of ``what``."""

    what: str
    ratio: float
    asked: float
    passed: bool

    def __str__(self) -> str:
        outcome = "pass" if self.passed else "FAIL"
        sign = "≥" if self.what.startswith("time") else "≤"
        return f"{outcome}  {self.what}: {self.ratio:.3f}, asked {sign} {self.asked}"


def verdicts(
    targets: Sequence[Target],
    milliseconds: Mapping[str, float],
    held_bytes: Mapping[str, int],
) -> list[Verdict]:
    """The outcome of each target; a ValueError names a contestant that did not run."""
    outcomes = []
    for target in targets:
        ran = [name for name in target.baselines if name in milliseconds]
        if not ran or target.ours not in milliseconds:
            missing = target.ours if ran else " and ".join(target.baselines)
            raise ValueError(f"{missing} did not run, only {', '.join(milliseconds)}")
        fastest = min(ran, key=lambda name: milliseconds[name])
        ratio = milliseconds[fastest] / milliseconds[target.ours]
        what = f"time of {fastest} over {target.ours}"
        outcomes.append(Verdict(what, ratio, target.speedup, ratio >= target.speedup))
        if target.bytes_share is not None:
            least = min(held_bytes[name] for name in ran)
            share = held_bytes[target.ours] / least
            what = f"bytes of {target.ours} over {' or '.join(ran)}"
            asked = target.bytes_share
            outcomes.append(Verdict(what, share, asked, share <= asked))
    return outcomes
