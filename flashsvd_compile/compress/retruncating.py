"""`retruncate_`: cut the ranks of factors further, in place, while they are trained.

Each latent, a layer's own or one that two sides of heads share (``latents.py``), is cut to its most
important components (``balanced.py``). Without calibration these are the singular values of the
product of both sides and each latent keeps the same share; with it they count by what they do to
the loss, to second order, and all latents of the model compete for bytes in one list, as
`compress_` plans (``ranks.py``). What a smaller rank loses is not fitted anew: training goes on.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd_compile.compress import latent_metric
from flashsvd_compile.compress.balanced import Components, components, root_of_rows
from flashsvd_compile.compress.fits import tails
from flashsvd_compile.compress.fitting import progress
from flashsvd_compile.compress.joint_modules import NarrowHeadsLinear
from flashsvd_compile.compress.latents import Latent, Layer, Side, find_latents, find_layers
from flashsvd_compile.compress.linears import model_bytes, select
from flashsvd_compile.compress.moments import Loss, collect
from flashsvd_compile.compress.optimizer_state import (
    carried,
    check_optimizer,
    swap_parameters,
)
from flashsvd_compile.compress.ranks import Layer as Choices
from flashsvd_compile.compress.ranks import plan_ranks, share_within
from flashsvd_compile.compress.report import RetruncateReport, RetruncateRow
from flashsvd_compile.options import parse_bytes


def retruncate_(
    model: nn.Module,
    *,
    keep: float | None = None,
    weight_budget: int | str | None = None,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    seed: int = 0,
) -> RetruncateReport:
    """Cut the ranks of this package's low-rank layers in ``model`` further, in place.

    Args:
        model: any module with low-rank layers, as `compress_` and `load_checkpoint` leave it.
        keep: share of the parameters that the factors of those layers have at present, in (0, 1),
            that stays; biases do not count. Give this or ``weight_budget``.
        weight_budget: bytes that all parameters of the model may take together, a number or
            ``"200MiB"``.
        calibration, loss, seed: as of `compress_`. With calibration ranks are planned by loss;
            without, each layer keeps the same share of its ranks, the largest singular values.
        optimizer: of ``model``: its groups are given the new parameters, and of its state, means of
            gradients and of their squares are carried into the new bases
            (``optimizer_state.py``); of parameters with any other state it is dropped.
        include: `fnmatch` patterns of module paths; only low-rank layers that match one are cut.
            None means all. Two layers that share narrowed heads are cut together or not at all.
        exclude: patterns of layers to leave; wins over ``include``.

    Modules stay the same objects with the same hooks; the parameters that are cut are new ones, of
    the same dtype, device and ``requires_grad``, without a ``.grad``: call this between a step and
    the next forward. Factors that several layers share stay, with the reason in the report. What
    was compiled is compiled again. An error or an interrupt before the last moment leaves model and
    optimizer untouched.

    Raises TypeError and ValueError for arguments that are none, ValueError for a model without
    low-rank layers, for factors that are not finite or on the meta device, and for a budget that
    the smallest ranks exceed.
    """
    budget = parse_bytes("weight_budget", weight_budget)
    if (keep is None) == (budget is None):
        raise ValueError("give keep or weight_budget, one of both")
    share = None if keep is None else _validated(keep)
    if calibration is None and loss is not None:
        raise ValueError("loss is that of calibration: give both")
    if optimizer is not None:
        check_optimizer(optimizer)
    layers = find_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no low-rank layer to cut")
    left_out = select(layers, include, exclude)
    latents, reasons = find_latents(model, layers)
    reasons = reasons | left_out
    for latent in latents:
        left = next((left_out[x.path] for x in latent.layers if x.path in left_out), None)
        if left is not None:
            for layer in latent.layers:
                reasons.setdefault(layer.path, f"the other side of its heads is {left}")
    latents = [x for x in latents if not any(layer.path in reasons for layer in x.layers)]
    for latent in latents:
        _validate(latent)

    found, unseen = _components(model, latents, calibration, loss, seed)
    for latent in latents:
        if latent.name in unseen:
            reasons |= {layer.path: unseen[latent.name] for layer in latent.layers}
    latents = [latent for latent in latents if latent.name in found]
    before = model_bytes(model)
    own = sum(latent.bytes for latent in latents)
    if budget is not None:
        share = share_within(budget, before, own, "what cannot be cut")
    assert share is not None
    if calibration is None:
        ranks = {x.name: max(1, math.floor(share * x.rank + 1e-9)) for x in latents}
    else:
        losses = {x.name: tails(found[x.name].sigma) for x in latents}
        choices = {x.name: Choices(losses[x.name], x.bytes // x.rank, x.bytes) for x in latents}
        planned = plan_ranks(choices, int(share * own + 1e-6)) if choices else {}
        ranks = {x.name: planned[x.name] or x.rank for x in latents}
    if budget is not None:
        _check_budget(budget, before - own, latents, ranks)

    cuts: list[_Cut] = []
    for latent in latents:
        rank = ranks[latent.name]
        if rank < latent.rank:
            cuts.append(_cut(latent, found[latent.name], rank, optimizer))
        else:
            why = "all of its ranks are worth their bytes"
            if latent.rank == 1 or calibration is None:
                why = f"its rank {latent.rank} leaves nothing to cut"
            reasons |= {layer.path: why for layer in latent.layers}
    rows = _rows(layers, cuts, reasons, found if calibration is not None else {})
    _swap(cuts, optimizer)
    method = "svd" if calibration is None else "planned"
    return RetruncateReport(share, tuple(rows), before, model_bytes(model), method)


def _validated(keep: float) -> float:
    if not isinstance(keep, Real) or isinstance(keep, bool):
        raise TypeError(f"keep must be a number in (0, 1), got {keep!r}")
    if not 0 < keep < 1:
        raise ValueError(f"keep must be in (0, 1), the share of factors that stays, got {keep!r}")
    return float(keep)


def _validate(latent: Latent) -> None:
    for side in (*latent.writes, *latent.reads):
        if side.parameter.is_meta:
            raise ValueError(f"{latent.name}: factors on the meta device; load the model first")
        if not torch.isfinite(side.parameter).all():
            raise ValueError(f"{latent.name}: its {side.name} holds values that are not finite")


def _check_budget(
    budget: int, rest: int, latents: Sequence[Latent], ranks: Mapping[str, int]
) -> None:
    whole = rest + sum(x.bytes // x.rank * ranks[x.name] for x in latents)
    if whole > budget:
        raise ValueError(
            f"weight_budget is {budget} bytes, and with the smallest ranks the model takes {whole}"
        )


def _components(
    model: nn.Module,
    latents: Sequence[Latent],
    calibration: Iterable[Any] | None,
    loss: Loss | None,
    seed: int,
) -> tuple[dict[str, Components], dict[str, str]]:
    """Of each latent by name, and why some have none."""
    if calibration is None:
        return {x.name: components(x.writing(), x.reading()) for x in latents}, {}
    places = {x.name: latent_metric.watched(x) for x in latents}
    unseen = {name: place for name, place in places.items() if isinstance(place, str)}
    seen = {name: place for name, place in places.items() if not isinstance(place, str)}
    collect(model, list(seen.values()), progress(calibration, "calibrate"), loss, seed)
    found = {}
    for latent in latents:
        if latent.name not in seen:
            continue
        moments = seen[latent.name].moments
        if why := latent_metric.why_unseen(moments):
            unseen[latent.name] = why
        else:
            found[latent.name] = components(*latent_metric.roots(latent, moments))
    return found, unseen


@dataclass(frozen=True)
class _Cut:
    """All that takes the old one's place, by the side or the old parameter."""

    latent: Latent
    rank: int
    error: float
    new: dict[nn.Parameter, nn.Parameter]
    places: tuple[tuple[Side, nn.Parameter], ...]
    states: dict[nn.Parameter, dict[str, Any]]


@torch.no_grad()
def _cut(
    latent: Latent, found: Components, rank: int, optimizer: torch.optim.Optimizer | None
) -> _Cut:
    narrow, widen = found.cut(rank)
    a, b = root_of_rows(latent.writing()), root_of_rows(latent.reading())
    narrow, widen = _balanced(narrow, widen, a, b)
    product = b @ a.mT
    whole = torch.linalg.matrix_norm(product).square().sum()
    gap = torch.linalg.matrix_norm(product - (b @ widen) @ (narrow @ a.mT)).square().sum()
    places, states = [], {}
    changes = [(side, narrow, widen.mT) for side in latent.writes]
    changes += [(side, widen.mT, narrow) for side in latent.reads]
    for side, change, of_gradients in changes:
        old = side.parameter
        by_rank = side.by_rank(old.double())
        if latent.kind != "layer" and len(by_rank) != len(change):
            change = change.repeat_interleave(latent.group, 0)
            of_gradients = of_gradients.repeat_interleave(latent.group, 0)
        value = side.stored(change @ by_rank).to(old.dtype).contiguous()
        places.append((side, nn.Parameter(value, old.requires_grad)))
        if optimizer is not None:
            states[old] = carried(optimizer.state.get(old, {}), side, of_gradients)
    new = {side.parameter: parameter for side, parameter in places}
    error = float((gap / whole).sqrt()) if whole > 0 else 0.0
    return _Cut(latent, rank, error, new, tuple(places), states)


def _balanced(narrow: Tensor, widen: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same cut, with each component as long in what writes it as in what reads it."""
    written = torch.linalg.vector_norm(narrow @ a.mT, dim=-1)
    read = torch.linalg.vector_norm(b @ widen, dim=-2)
    tiny = torch.finfo(torch.float64).tiny
    scale = (read / written.clamp_min(tiny)).sqrt()
    scale = torch.where((written > 0) & (read > 0), scale, 1.0)
    return narrow * scale[..., None], widen / scale[..., None, :]


def _swap(cuts: Sequence[_Cut], optimizer: torch.optim.Optimizer | None) -> None:
    """Nothing here can fail for what a user gave."""
    for cut in cuts:
        for side, parameter in cut.places:
            side.module._parameters[side.name] = parameter
        for layer in cut.latent.layers:
            module = layer.module
            module.rank = cut.rank
            if isinstance(module, NarrowHeadsLinear):
                module.lift = module.lift[:, : cut.rank].contiguous()
        if optimizer is not None:
            swap_parameters(optimizer, cut.new, cut.states)


def _rows(
    layers: Sequence[Layer],
    cuts: Sequence[_Cut],
    reasons: Mapping[str, str],
    found: Mapping[str, Components],
) -> list[RetruncateRow]:
    by_path = {layer.path: cut for cut in cuts for layer in cut.latent.layers}
    rows = []
    for layer in layers:
        rank, size = layer.module.rank, layer.bytes
        cut = by_path.get(layer.path)
        if cut is None:
            rows.append(RetruncateRow(layer.path, rank, rank, size, size, 0.0, reasons[layer.path]))
            continue
        lost = None
        if cut.latent.name in found:
            lost = tails(found[cut.latent.name].sigma)[cut.rank] / len(cut.latent.layers)
        after = size // rank * cut.rank
        rows.append(RetruncateRow(layer.path, rank, cut.rank, size, after, cut.error, "", lost))
    return rows
