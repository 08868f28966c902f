"""What each method calibrates, how it factors a matrix, and who gets which rank."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd_compile.compress.fits import Spectrum, spectrum_of, tails
from flashsvd_compile.compress.matrices import Matrices
from flashsvd_compile.compress.moments import Loss, Moments, Watched, collect
from flashsvd_compile.compress.ranks import Layer, plan_ranks
from flashsvd_compile.compress.svd import rank_for, svd_dtype

# What each method sums up while it calibrates.
METHODS: Mapping[str, frozenset[str]] = {
    "svd": frozenset(),
    "fwsvd": frozenset({"fisher"}),
    "whitened": frozenset({"inputs"}),
    "planned": frozenset({"inputs", "outputs"}),
}

# A moment of more outputs than this takes gigabytes: output layers over a vocabulary have them.
MAX_OUTPUTS = 16384


@dataclass(frozen=True)
class Method:
    """``moments``: of the layers that calibration reached, by path; empty for plain SVD. ``caps``:
    the largest ranks that layers may have, by path; of those that have any."""

    name: str
    moments: Mapping[str, Moments]
    caps: Mapping[str, int] = field(default_factory=dict)

    def factors(self, path: str, one: Matrices, rank: int) -> tuple[Tensor, Tensor, list[float]]:
        """``u``, ``v``, and what is lost at each rank from 0 on, as the method measures it."""
        spectrum = self._spectrum(path, one)
        return *spectrum.factors(rank), tails(spectrum.sigma)

    def ranks(self, matrices: Mapping[str, Matrices], keep: float) -> dict[str, int | None]:
        """Within ``keep`` of the bytes of all ``matrices``; None where the matrix stays."""
        if self.name != "planned":
            ranks = {path: rank_for(keep, *one.shape) for path, one in matrices.items()}
            return {path: min(rank, self.caps.get(path, rank)) for path, rank in ranks.items()}
        layers = {path: self.layer(path, one) for path, one in matrices.items()}
        whole = sum(one.linear.weight_bytes for one in matrices.values())
        return plan_ranks(layers, int(keep * whole + 1e-6))

    def layer(self, path: str, one: Matrices) -> Layer:
        """What each rank costs and loses."""
        losses = tails(self._spectrum(path, one).sigma)
        return Layer(losses, one.rank_bytes, one.linear.weight_bytes, self.caps.get(path))

    def _spectrum(self, path: str, one: Matrices) -> Spectrum:
        if self.name == "svd":
            precise = one.stacked.to(svd_dtype(one.weight))
            return Spectrum(*torch.linalg.svd(precise, full_matrices=False))
        found = self.moments[path]
        inputs = found.fisher if self.name == "fwsvd" else found.inputs
        assert inputs is not None
        return spectrum_of(one.stacked, inputs / found.tokens, found.outputs)


def calibrated(
    name: str,
    model: nn.Module,
    matrices: Mapping[str, Matrices],
    batches: Iterable[Any],
    loss: Loss | None,
    seed: int,
) -> tuple[Method, dict[str, str]]:
    """The method, and by path why some of ``matrices`` cannot be factored by it."""
    wants = METHODS[name]
    if not wants:
        return Method(name, {}), {}
    too_wide = {}
    if "outputs" in wants:
        too_wide = {
            path: f"its {one.shape[0]} outputs are more than the {MAX_OUTPUTS} that a metric of "
            "gradients can have"
            for path, one in matrices.items()
            if one.shape[0] > MAX_OUTPUTS
        }
    watched = {
        path: Watched(one.linear.module, (*one.lead, one.shape[0]), wants)
        for path, one in matrices.items()
        if path not in too_wide
    }
    collect(model, list(watched.values()), batches, loss, seed)
    dead = {path: why for path, one in watched.items() if (why := why_dead(one.moments, wants))}
    moments = {path: one.moments for path, one in watched.items() if path not in dead}
    return Method(name, moments), too_wide | dead


def why_dead(moments: Moments, wants: frozenset[str]) -> str:
    """Empty where calibration told what the method needs."""
    if not moments.tokens:
        return "calibration did not reach it"
    if not all(_is_finite(getattr(moments, name)) for name in wants - {"inputs"}):
        return "the loss does not depend on it"
    return "" if _is_finite(moments.inputs) or "inputs" not in wants else "its inputs are zero"


def _is_finite(moment: Tensor | None) -> bool:
    """Whether it is there, and tells something."""
    if moment is None or not moment.any():
        return False
    if not torch.isfinite(moment).all():
        raise ValueError("calibration gave values that are not finite")
    return True
