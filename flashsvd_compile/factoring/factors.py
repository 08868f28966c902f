"""The factors of one weight, and whether that weight still is what they were made of.

    u [H·r, in]    v [H, D, r]        per head
    u [r, in]      v [out, r]         a whole matrix

A change is noticed by what tensors tell without being read: the storage, the place in it, and the
counter of writes in place. ``copy_``, ``load_state_dict``, an optimiser's step, ``p.data = new``
and another parameter in the module's place are noticed. Not noticed is what moves no counter: a
write through ``p.data`` (``p.data.copy_()``), by a kernel that torch does not know of, or into an
inference tensor.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from flashsvd_compile.compress.svd import truncated_svd
from flashsvd_compile.factoring.ranks import rank_of


@dataclass(frozen=True)
class Form:
    """How a weight is read: as ``heads`` matrices one below the other; [in, out] or [out, in]."""

    heads: int
    is_transposed: bool

    def matrices(self, weight: Tensor) -> Tensor:
        """[H, D, in], or [out, in] of a whole matrix."""
        matrix = weight.detach()
        matrix = matrix.t() if self.is_transposed else matrix
        return matrix if self.heads == 1 else matrix.unflatten(0, (self.heads, -1))


@contextmanager
def _plainly() -> Iterator[None]:
    """Where tensors are made that may be read and written in any mode, later."""
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
        yield


class Stamp:
    """What a weight was at some time.

    The storage is held weakly: that keeps its identity from being given to another one, not its
    memory.
    """

    def __init__(self, weight: Tensor) -> None:
        self._storage = StorageWeakRef(weight.untyped_storage())
        self._place = weight.data_ptr()
        self._writes = _writes(weight)

    def fits(self, weight: Tensor) -> bool:
        return (
            weight.untyped_storage()._cdata == self._storage.cdata
            and weight.data_ptr() == self._place
            and _writes(weight) == self._writes
        )


def _writes(weight: Tensor) -> int | None:
    """The counter of writes in place; None for an inference tensor, which has none."""
    return None if weight.is_inference() else weight._version


class Factors:
    """``u`` and ``v`` of one weight at one rank."""

    def __init__(self, weight: Tensor, form: Form, rank: int) -> None:
        self.form, self.rank = form, rank
        self._stamp = Stamp(weight)
        self.u, self.v = self._computed(weight)

    def is_current(self, weight: Tensor) -> bool:
        """Is ``weight``, as far as it tells, what these factors were made of?"""
        return self._stamp.fits(weight)

    def renew(self, weight: Tensor) -> None:
        """Write the factors of what ``weight`` is now in the place of the old ones.

        Raises ValueError for values that are not finite.
        """
        stamp = Stamp(weight)
        u, v = self._computed(weight)
        with _plainly():
            self.u.copy_(u)
            self.v.copy_(v)
        self._stamp = stamp

    def _computed(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        with _plainly():
            if not torch.isfinite(weight).all():
                raise ValueError("a weight to factor holds values that are not finite")
            u, v = truncated_svd(self.form.matrices(weight), self.rank)
            return u.flatten(0, -2), v


@dataclass(frozen=True)
class Spectrum:
    """The singular values [.., min(m, n)] of a weight's matrices, and their rank."""

    sigma: Tensor
    rank: int

    def error(self, rank: int) -> float:
        """‖W − W_r‖ / ‖W‖ of the best W_r of rank ``rank``, over all heads; 0 for zeros."""
        energy = self.sigma.double().square()
        total = float(energy.sum())
        return (float(energy[..., rank:].sum()) / total) ** 0.5 if total > 0 else 0.0


# Weight → form → when its spectrum was computed, and what it was.
_seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def spectrum(weight: Tensor, form: Form) -> Spectrum | None:
    """That of ``weight`` as it is now, computed once for all graphs; None for values that are not
    finite."""
    seen: dict[Form, tuple[Stamp, Spectrum | None]] = _seen.setdefault(weight, {})
    stamp, found = seen.get(form, (None, None))
    if stamp is None or not stamp.fits(weight):
        stamp = Stamp(weight)
        found = _spectrum(weight, form)
        seen[form] = stamp, found
    return found


def _spectrum(weight: Tensor, form: Form) -> Spectrum | None:
    with _plainly():
        if not torch.isfinite(weight).all():
            return None
        matrices = form.matrices(weight)
        sigma = _singular_values(matrices)
        return Spectrum(sigma, rank_of(matrices, sigma))


def _singular_values(matrices: Tensor) -> Tensor:
    """Those of [.., m, n], the largest first.

    As roots of the eigenvalues of the smaller Gram matrix, in float64: a fraction of an SVD's work,
    and right to 1e-8 of the largest, which is below what a float32 SVD resolves.
    """
    if matrices.dtype == torch.float64:
        return torch.linalg.svdvals(matrices)
    short = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    short = short.double()
    return torch.linalg.eigvalsh(short @ short.mT).clamp(min=0).sqrt().flip(-1)


# Weight → (form, rank) → its factors. Graphs that are compiled of one weight again, for another
# shape or in another mode, share them; they go with the last graph, or with the weight.
_Made = weakref.WeakValueDictionary[tuple[Form, int], Factors]
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def factors_of(weight: Tensor, form: Form, rank: int) -> Factors:
    """Factors of what ``weight`` is now: those that a graph holds already, or new ones.

    Raises ValueError for values that are not finite.
    """
    made: _Made = _made.setdefault(weight, weakref.WeakValueDictionary())
    factors = made.get((form, rank))
    if factors is None:
        factors = made[form, rank] = Factors(weight, form, rank)
    elif not factors.is_current(weight):
        factors.renew(weight)
    return factors
