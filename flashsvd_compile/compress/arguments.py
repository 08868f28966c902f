"""What a compressor is asked for, checked: a method, and how large factors shall be."""

import difflib
from collections.abc import Sequence
from numbers import Real
from typing import Any

from flashsvd_compile.compress.methods import METHODS
from flashsvd_compile.options import parse_bytes


def method_of(method: str | None, calibration: Any, allowed: Sequence[str], default: str) -> str:
    """The ``method``, one of ``allowed``; where None is named, plain SVD, or ``default`` where
    there is ``calibration``.

    Raises ValueError for an unknown one, one that lacks calibration and one that takes none.
    """
    if method is None:
        return "svd" if calibration is None else default
    if method not in allowed:
        nearest = difflib.get_close_matches(str(method), allowed, n=1, cutoff=0)[0]
        raise ValueError(
            f"unknown method {method!r}; the nearest is {nearest!r} (allowed: {', '.join(allowed)})"
        )
    if METHODS[method] and calibration is None:
        raise ValueError(f"method={method!r} needs calibration: an iterable of the model's inputs")
    if not METHODS[method] and calibration is not None:
        raise ValueError(f"method={method!r} looks at no data; leave calibration out")
    return method


def size_of(keep: float | None, weight_budget: int | str | None) -> tuple[float, int | None]:
    """The share of parameters to keep, 0.5 where nothing is asked for, and the budget in bytes,
    which replaces it.

    Raises ValueError where both are given, and TypeError or ValueError for what is neither.
    """
    budget = parse_bytes("weight_budget", weight_budget)
    if budget is not None and keep is not None:
        raise ValueError("keep and weight_budget both say how large factors are: give one")
    if keep is None:
        return 0.5, budget
    if not isinstance(keep, Real) or isinstance(keep, bool):
        raise TypeError(f"keep must be a number in (0, 1], got {keep!r}")
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], the share of parameters to keep, got {keep!r}")
    return float(keep), budget
