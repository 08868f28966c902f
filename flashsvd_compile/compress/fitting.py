"""From ranks to modules: what takes the place of each linear, and what that costs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm import tqdm

from flashsvd_compile.compress.anchored import Anchored
from flashsvd_compile.compress.blocks import find_blocks
from flashsvd_compile.compress.choosing import weight_bytes
from flashsvd_compile.compress.heads import Projections
from flashsvd_compile.compress.joint import Joint, find_joints, unseen_outside
from flashsvd_compile.compress.linears import (
    Linear,
    holders_of,
    module_paths,
    parameter_bytes,
    sharing,
)
from flashsvd_compile.compress.matrices import Matrices
from flashsvd_compile.compress.methods import Method
from flashsvd_compile.compress.moments import in_evaluation, mask_of
from flashsvd_compile.compress.narrowing import error_of, losses_of
from flashsvd_compile.compress.ranks import Layer, plan_ranks
from flashsvd_compile.compress.report import CompressRow, Kind, curve_of


@dataclass(frozen=True)
class Fitted:
    """``error`` and ``loss`` as in `CompressRow`; ``losses``: at each rank from 0 on, as the method
    measures it, for a narrowed one together with its other side."""

    module: nn.Module
    kind: Kind
    rank: int
    error: float
    losses: Sequence[float]
    loss: float | None = None

    @property
    def bytes(self) -> int:
        own = self.module.named_parameters()
        return sum(parameter_bytes(p) for name, p in own if name != "bias")


# By path what takes a linear's place, or why it stays.
Fits = dict[str, Fitted | str]


def matrix_by_matrix(how: Method, matrices: Mapping[str, Matrices], keep: float) -> Fits:
    """Each factored for itself."""
    ranks = how.ranks(matrices, keep)
    return {path: factored(how, path, matrices[path], rank) for path, rank in ranks.items()}


def planned(
    model: nn.Module,
    how: Method,
    matrices: Mapping[str, Matrices],
    projections: Sequence[Projections],
    batches: Sequence[Any],
    keep: float,
) -> Fits:
    """Ranks from one list over the whole model; blocks fitted one after another, where the model
    has any, and heads narrowed on both sides, where nothing stands between."""
    alone = _held_elsewhere(model, matrices)
    free = {path: one for path, one in matrices.items() if path not in alone}
    with in_evaluation(model):
        blocks = find_blocks(model, free, batches)
        if blocks is not None:
            joints = unseen_outside(model, find_joints(blocks, free, projections), free, batches[0])
            layers = {path: how.layer(path, one) for path, one in matrices.items()}
            for joint in joints:
                both = [layers.pop(path) for path in joint.paths]
                layers[joint.name] = _together(joint, both, how, matrices)
            ranks = plan_ranks(layers, int(keep * weight_bytes(matrices) + 1e-6))
            masks = [mask_of(batch) for batch in batches]
            anchored = Anchored(model, blocks, free, joints, how.moments, masks)
            for _ in progress(anchored.fit(ranks), "fit blocks", len(blocks.paths)):
                pass
    if blocks is None:
        return matrix_by_matrix(how, matrices, keep)
    fits: Fits = {}
    joint_of = {path: joint for joint in joints for path in joint.paths}
    for path, one in matrices.items():
        pair = joint_of.get(path)
        name = path if pair is None else pair.name
        rank, made = ranks[name], anchored.made.get(path)
        if made is not None:
            _train_as(one.linear.module, made)
        if pair is not None and (made is None or rank is None):
            fits[path] = "heads that are narrowed lose more than their bytes are worth"
        elif rank is None or made is None:
            fits[path] = factored(how, path, one, rank)
        elif pair is None:
            error, losses = one.error_of(made), layers[name].losses  # type: ignore[arg-type]
            fits[path] = Fitted(made, one.kind, rank, error, losses, losses[rank])
        else:
            error, losses = error_of(pair, matrices, anchored.made), layers[name].losses
            fits[path] = Fitted(made, "narrow", rank, error, losses, losses[rank] / 2)
    return fits


def _held_elsewhere(model: nn.Module, matrices: Mapping[str, Matrices]) -> set[str]:
    """Linears that are used in several places, or whose bias is: what suits one place would not
    suit the others."""
    paths = module_paths(model)
    holders = holders_of(paths)
    return {
        path
        for path, one in matrices.items()
        if len(one.linear.paths) > 1 or sharing(one.linear.module, "bias", paths, holders)
    }


def _train_as(dense: nn.Module, made: nn.Module) -> None:
    """What was frozen stays so, and only that."""
    flags = {name: p.requires_grad for name, p in dense.named_parameters()}
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(flags["bias" if name == "bias" else "weight"])
    made.train(dense.training)


def _together(
    joint: Joint, alone: Sequence[Layer], how: Method, matrices: Mapping[str, Matrices]
) -> Layer:
    dense_bytes = sum(layer.dense_bytes for layer in alone)
    losses = losses_of(joint, matrices, how.moments)
    cap = min((layer.cap for layer in alone if layer.cap is not None), default=None)
    return Layer(losses, dense_bytes // joint.head_dim, dense_bytes, cap)


def factored(how: Method, path: str, one: Matrices, rank: int | None) -> Fitted | str:
    """One, for itself; or why factors would be no smaller."""
    if rank is None or not one.is_smaller(rank):
        what = "that lose less" if rank is None else f"of rank {rank}"
        return f"factors {what} are no smaller than {[*one.shape]}"
    u, v, losses = how.factors(path, one, rank)
    made = one.module(u, v, rank)
    made.method = how.name
    loss = losses[rank] if how.name == "planned" else None
    return Fitted(made, one.kind, rank, one.error_of(made), losses, loss)


def row_of(linear: Linear, fit: Fitted | str) -> CompressRow:
    """Of the report: what takes the place of ``linear``, or why it stays."""
    path, size = linear.path, linear.weight_bytes
    if isinstance(fit, str):
        return CompressRow(path, "dense", None, size, size, 0.0, fit)
    curve = curve_of(fit.losses, fit.rank)
    return CompressRow(path, fit.kind, fit.rank, size, fit.bytes, fit.error, "", fit.loss, curve)


def progress(steps: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
    """A bar, where somebody may see one."""
    return tqdm(steps, desc=what, total=total, disable=None, leave=False)
