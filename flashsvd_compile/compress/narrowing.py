"""Heads narrowed to a rank: the best factors of the identity between two sides of a head.

A head's D features pass from one linear to another. Put S P in between, of rank r: what that
changes in the loss is ‖G^½ (S P − 1) H^½‖² with H the moment of what comes in and G that of the
gradient at what goes out, so S and P are the truncated SVD of G^½ H^½, mapped back (``fits.py``).
Query and key: H of queries, G of the gradient at them, which lies among the keys. Value and output:
both at the weighted mean of the values.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flashsvd_compile.compress import fits
from flashsvd_compile.compress.fits import Spectrum, tails
from flashsvd_compile.compress.joint import Joint
from flashsvd_compile.compress.matrices import Matrices
from flashsvd_compile.compress.moments import Moments


def losses_of(
    joint: Joint, matrices: Mapping[str, Matrices], moments: Mapping[str, Moments]
) -> list[float]:
    """What narrowing all heads to each rank from 0 on loses."""
    return tails(spectrum_of(joint, matrices, moments).sigma)


def spectrum_of(
    joint: Joint, matrices: Mapping[str, Matrices], moments: Mapping[str, Moments]
) -> Spectrum:
    """By what calibration told of the dense model."""
    path = joint.first if joint.kind == "scores" else joint.second
    found = moments[path]
    assert found.inputs is not None
    inputs = found.inputs.double() / found.tokens
    if joint.kind == "scores":
        queries = matrices[path].weight.double().reshape(*joint.shape, -1)
        return spectrum_of_scores(joint, queries @ inputs @ queries.mT, moments)
    return spectrum_of_values(joint, inputs, matrices[path], moments)


def spectrum_of_scores(joint: Joint, queries: Tensor, moments: Mapping[str, Moments]) -> Spectrum:
    """``queries`` [heads, group, D, D]: their moment."""
    outputs = moments[joint.first].outputs
    assert outputs is not None
    return _spectrum(queries, outputs.double().reshape(queries.shape))


def spectrum_of_values(
    joint: Joint, inputs: Tensor, output: Matrices, moments: Mapping[str, Moments]
) -> Spectrum:
    """``inputs`` [H·D, H·D]: the moment of what the output projection reads."""
    outputs, count = moments[joint.second].outputs, joint.heads * joint.group
    assert outputs is not None
    by_head = inputs.reshape(count, joint.head_dim, count, joint.head_dim)
    own = by_head.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    weight = output.weight.double().reshape(-1, count, joint.head_dim)
    gradients = torch.einsum("ohd,op,phe->hde", weight, outputs.double(), weight)
    return _spectrum(*(x.reshape(*joint.shape, joint.head_dim) for x in (own, gradients)))


def _spectrum(inputs: Tensor, outputs: Tensor) -> Spectrum:
    """Of the identity; heads that read the same one share it."""
    eye = torch.eye(inputs.shape[-1], dtype=torch.float64, device=inputs.device)
    return fits.spectrum_of(eye.expand(len(inputs), -1, -1), inputs.mean(1), outputs.sum(1))


@torch.no_grad()
def error_of(
    joint: Joint, matrices: Mapping[str, Matrices], made: Mapping[str, nn.Module]
) -> float:
    """‖B A − B' A'‖ / ‖B A‖ over heads of the product of both sides, as `CompressRow` has it."""
    before = [_sides(joint, path, matrices[path].weight.double()) for path in joint.paths]
    after = [_sides(joint, path, _weight_of(made[path])) for path in joint.paths]

    def inner(left: list[Tensor], right: list[Tensor]) -> float:
        """Σ tr (B A)ᵀ (B' A') by products no larger than a head's."""
        firsts, seconds = (a @ b.mT for a, b in zip(left, right, strict=True))
        return float((firsts * seconds).sum())

    whole = inner(before, before)
    gap = whole - 2 * inner(before, after) + inner(after, after)
    return (max(0.0, gap) / whole) ** 0.5 if whole > 0 else 0.0


def _sides(joint: Joint, path: str, weight: Tensor) -> Tensor:
    """[heads, group, D, features] of one side, repeated where the group shares it."""
    if joint.kind == "values" and path == joint.second:
        weight = weight.t()
    heads = weight.reshape(joint.heads, -1, joint.head_dim, weight.shape[-1])
    return heads.expand(-1, joint.group, -1, -1)


def _weight_of(module: nn.Module) -> Tensor:
    """[out, in] of a narrow linear, with zeros for what it does not make or read."""
    return module.dense_weight().double()  # type: ignore[operator]
