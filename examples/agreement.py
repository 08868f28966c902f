"""Whether a compiled model says what the model itself says, up to what eager itself rounds."""

import torch
from torch import Tensor

from examples.generating import Continuation

EAGER_ERROR = 1.1  # times what eager errs
ROUNDINGS = 4  # of the largest logit, for those that eager happened to be spared


class DisagreementError(Exception):
    """Results that no rounding explains."""


def check_logits(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Raise `DisagreementError` where ``got`` is further from ``exact``, the float64 model's, than
    ``eager`` is."""
    error, budget = largest(got - exact), budget_of(eager, exact)
    if not error <= budget:  # NaN must not pass
        raise DisagreementError(
            f"logits are off by {error:.1e}; eager errs by {largest(eager - exact):.1e}, and "
            f"{budget:.1e} would pass"
        )


def check_tokens(got: Continuation, eager: Continuation, budget: float) -> int:
    """How many rows differ, where each first difference is between tokens that eager finds equally
    likely, within twice the ``budget`` of its logits; what follows it answers to another text.

    Raises `DisagreementError` where one is not.
    """
    differs = got.tokens != eager.tokens
    rows = differs.any(1).nonzero().flatten().tolist()
    for row in rows:
        at = int(differs[row].int().argmax())
        choice = eager.logits[row, at]
        gap = float(choice[eager.tokens[row, at]] - choice[got.tokens[row, at]])
        if not gap <= 2 * budget:
            raise DisagreementError(
                f"greedy token {at} of row {row} is {int(got.tokens[row, at])}, not "
                f"{int(eager.tokens[row, at])}, whose logit is {gap:.1e} larger"
            )
    return len(rows)


def budget_of(eager: Tensor, exact: Tensor) -> float:
    eps = torch.finfo(eager.dtype).eps
    return EAGER_ERROR * largest(eager - exact) + ROUNDINGS * eps * largest(exact)


def largest(values: Tensor) -> float:
    return float(values.abs().max())
