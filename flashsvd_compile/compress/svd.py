"""`compress_`: replace a model's linear layers by the factors of their truncated SVD.

    W = Q Σ Zᵀ ≈ V U        V = Q_r √Σ_r  [out, r]        U = √Σ_r Z_rᵀ  [r, in]

the best approximation of rank r in the Frobenius norm (Eckart–Young). The root of each singular
value goes into both factors, so that neither outgrows the range of half precision and a latent
has the scale of activations.

The share of parameters is uniform: an [m, n] matrix keeps ``keep`` of its m·n, hence
r = keep·m·n / (m + n), rounded down. Query, key and value projections are factored per head (each
head's [D, in] slice on its own), so that attention can run on the latents; every other linear
layer as one matrix. Nothing is calibrated: tools that weigh the error by data do better at the same
rank.
"""

import math
from collections.abc import Iterable
from numbers import Real

import torch
from torch import Tensor, nn

from flashsvd_compile.compress.heads import HeadLayout, find_head_layouts
from flashsvd_compile.compress.linears import (
    Linear,
    find_linears,
    model_bytes,
    parameter_bytes,
    replace_,
    select,
)
from flashsvd_compile.compress.modules import (
    FusedPerHeadLowRankLinear,
    LowRankLinear,
    PerHeadLowRankLinear,
)
from flashsvd_compile.compress.report import CompressReport, CompressRow, Kind

LowRank = LowRankLinear | PerHeadLowRankLinear | FusedPerHeadLowRankLinear


def compress_(
    model: nn.Module,
    keep: float = 0.5,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
) -> CompressReport:
    """Replace the linear layers of ``model`` in place by low-rank ones; biases are kept.

    Args:
        model: any module that holds ``nn.Linear`` or transformers' ``Conv1D``, with real weights.
        keep: share of its parameters that each factored matrix keeps, in (0, 1].
        include: `fnmatch` patterns of module paths (``"encoder.layer.*.output.dense"``); only
            linear layers that match one are factored. None means all.
        exclude: patterns of linear layers to leave dense; wins over ``include``.

    Layers whose factors would not be smaller, that share their weight, or that are more than a
    plain linear stay dense, with the reason in the report. An error leaves the model untouched.
    """
    _validate_keep(keep)
    linears = find_linears(model)
    if not linears:
        raise ValueError(f"{type(model).__name__} holds no nn.Linear or Conv1D to compress")
    if linears[0].path == "":
        raise ValueError("the model itself is a linear layer; pass the module that holds it")
    left_out = select(linears, include, exclude)
    out_features = {x.path: x.weight.shape[0] for x in linears if x.weight is not None}
    layouts = find_head_layouts(model, out_features)

    bytes_before = model_bytes(model)
    rows: list[CompressRow] = []
    replacements: list[tuple[Linear, LowRank]] = []
    for linear in linears:
        reason = left_out.get(linear.path) or linear.obstacle
        row, replacement = _factor(linear, layouts.get(linear.path), keep, reason)
        rows.append(row)
        if replacement is not None:
            replacements.append((linear, replacement))
    for linear, replacement in replacements:
        replace_(model, linear.paths, replacement)
    return CompressReport(float(keep), tuple(rows), bytes_before, model_bytes(model))


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors ``u`` [.., rank, n] and ``v`` [.., m, rank] of ``weight`` [.., m, n], in its dtype.

    Computed on the weight's device in float32, in float64 for a float64 weight.
    """
    precise = weight.to(_svd_dtype(weight))
    q, sigma, zh = torch.linalg.svd(precise, full_matrices=False)
    root = sigma[..., :rank].sqrt()
    u = root.unsqueeze(-1) * zh[..., :rank, :]
    v = q[..., :rank] * root.unsqueeze(-2)
    return u.to(weight.dtype).contiguous(), v.to(weight.dtype).contiguous()


def rank_for(keep: float, m: int, n: int) -> int:
    """The largest rank whose factors have at most ``keep`` of m·n parameters, at least 1."""
    return max(1, math.floor(keep * m * n / (m + n) + 1e-9))  # keep·m·n may fall just short


def _factor(
    linear: Linear, layout: HeadLayout | None, keep: float, reason: str
) -> tuple[CompressRow, LowRank | None]:
    """The report's row for a layer and its low-rank module, None where it stays dense."""
    before = linear.weight_bytes

    def dense(reason: str) -> tuple[CompressRow, None]:
        return CompressRow(linear.path, "dense", None, before, before, 0.0, reason), None

    weight = linear.weight
    if reason or weight is None:
        return dense(reason)
    if weight.is_meta:
        raise ValueError(f"{linear.path}: its weight is on the meta device; load the model first")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{linear.path}: its weight holds values that are not finite")
    m, n = weight.shape if layout is None else (layout.head_dim, weight.shape[1])
    rank = rank_for(keep, m, n)
    if rank * (m + n) >= m * n:
        return dense(f"factors of rank {rank} are no smaller than [{m}, {n}]")
    replacement = _low_rank_module(linear.module, weight, layout, rank)
    kind: Kind = "matrix" if layout is None else "per_head"
    after = parameter_bytes(replacement.u) + parameter_bytes(replacement.v)
    error = _relative_error(weight, replacement)
    return CompressRow(linear.path, kind, rank, before, after, error), replacement


@torch.no_grad()
def _low_rank_module(
    dense: nn.Module, weight: Tensor, layout: HeadLayout | None, rank: int
) -> LowRank:
    out_features, in_features = weight.shape
    module: LowRank
    with torch.device("meta"):  # no memory: the parameters are put in place below
        if layout is None:
            module = LowRankLinear(in_features, out_features, rank, bias=False)
        elif layout.parts == 1:
            module = PerHeadLowRankLinear(
                in_features, layout.num_heads, layout.head_dim, rank, bias=False
            )
        else:
            module = FusedPerHeadLowRankLinear(
                in_features, layout.parts, layout.num_heads, layout.head_dim, rank, bias=False
            )
    matrices = weight.detach().reshape(*module.v.shape[:-1], in_features)
    u, v = truncated_svd(matrices, rank)
    module.u = nn.Parameter(u, requires_grad=weight.requires_grad)
    module.v = nn.Parameter(v, requires_grad=weight.requires_grad)
    module.bias = dense._parameters.get("bias")  # the same object, so that a tied bias stays tied
    # The training flag, the hooks (their dicts, so that handles still remove them) and whatever
    # others have hung on the layer.
    own = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    vars(module).update({k: value for k, value in vars(dense).items() if k not in own})
    return module


@torch.no_grad()
def _relative_error(weight: Tensor, factors: LowRank) -> float:
    """‖W − V U‖ / ‖W‖, 0 for a weight of zeros."""
    precise = weight.to(_svd_dtype(weight))
    product = factors.v.to(precise.dtype) @ factors.u.to(precise.dtype)
    norm = torch.linalg.vector_norm(precise)
    gap = torch.linalg.vector_norm(precise - product.reshape(weight.shape))
    return float(gap / norm) if norm > 0 else 0.0


def _svd_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _validate_keep(keep: float) -> None:
    if not isinstance(keep, Real) or isinstance(keep, bool):
        raise TypeError(f"keep must be a number in (0, 1], got {keep!r}")
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], the share of parameters to keep, got {keep!r}")
