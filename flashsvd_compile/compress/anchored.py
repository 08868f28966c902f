"""Factors fitted block after block, to what the compressed model really gives them to read.

In the order of the model, each linear is first moved to where it returns what the dense one does
from inputs that are off by now (``regression.py``), then truncated in the metric of the loss, and
its bias takes what is off in the mean. Where its output is added to a residual, the target is the
sum: it returns, too, what the residual lacks. As AA-SVD and SAES-SVD (2026), with the metric of the
outputs, and with heads that are narrowed on both sides at once (``narrowing.py``).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flashsvd_compile.compress import fits
from flashsvd_compile.compress.blocks import Blocks, watch
from flashsvd_compile.compress.joint import Joint
from flashsvd_compile.compress.joint_modules import NarrowHeadsLinear, NarrowInputLinear
from flashsvd_compile.compress.linears import replace_
from flashsvd_compile.compress.matrices import Matrices, inherit
from flashsvd_compile.compress.moments import Moments, RealTokens
from flashsvd_compile.compress.narrowing import (
    spectrum_of,
    spectrum_of_scores,
    spectrum_of_values,
)
from flashsvd_compile.compress.regression import Moved, Sums, drawn_to, moved
from flashsvd_compile.compress.stages import Stage, stages_of

# How strongly a matrix is drawn to its own weight; what reads narrowed heads has few inputs to fit.
# all-MiniLM-L6-v2, 256 sentences: 0.01, 0.03 and 0.1 gave 0.0321, 0.0318, 0.0316 at keep 0.7 and
# 0.0473, 0.0469, 0.0469 at 0.5 (mean |Δcos| of `bench.fidelity`, 2026-11-27).
RIDGE = 0.03
RIDGE_OF_NARROWED = 0.003


log = logging.getLogger(__name__)


class Anchored:
    """Fits the modules of each block in turn. The model is as it was between calls."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        matrices: Mapping[str, Matrices],
        joints: Sequence[Joint],
        moments: Mapping[str, Moments],
        masks: Sequence[Tensor | None],
    ) -> None:
        self._model, self._blocks, self._matrices = model, blocks, matrices
        self._moments, self._masks = moments, masks
        self._joints = joints
        self._joint_of = {path: joint for joint in joints for path in joint.paths}
        self._dense = {path: one.linear.module for path, one in matrices.items()}
        self._values: dict[str, Moved] = {}
        self.made: dict[str, nn.Module] = {}

    @torch.no_grad()
    def fit(self, ranks: Mapping[str, int | None]) -> Iterator[str]:
        """Fills ``made``, what takes the dense ones' places by path; yields each block's path.

        ``ranks``: of matrices by path and of joints by name; None for those that stay.
        """
        dense = compressed = list(self._blocks.hidden)
        for index, path in enumerate(self._blocks.paths):
            own = {self._dense[p]: p for p in self._matrices if p.startswith(f"{path}.")}
            for stage in stages_of(self._blocks, index, dense[0], own):
                wanted = {p: at for p, at in stage.items() if ranks[self._unit(p)] is not None}
                sums = self._sums(index, wanted, dense, compressed) if wanted else None
                for one in wanted:
                    self._fit(one, sums, ranks)
            for joint in self._joints:
                rank = ranks[joint.name]
                is_done = self.made.keys() >= set(joint.paths) and joint.first not in self._values
                if rank is not None and joint.first.startswith(f"{path}.") and not is_done:
                    self._alone(joint, rank)
            dense_next = self._runs(index, dense)
            with self._in_place(index):
                compressed = self._runs(index, compressed)
            dense = dense_next
            yield path

    def _unit(self, path: str) -> str:
        return self._joint_of[path].name if path in self._joint_of else path

    def _runs(self, index: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        return [self._blocks.run(index, batch, x) for batch, x in enumerate(hidden)]

    @contextmanager
    def _in_place(self, index: int) -> Iterator[None]:
        """The block with what has been made of it."""
        own = [path for path in self.made if path.startswith(f"{self._blocks.paths[index]}.")]
        try:
            for path in own:
                replace_(self._model, self._matrices[path].linear.paths, self.made[path])
            yield
        finally:
            for path in own:
                replace_(self._model, self._matrices[path].linear.paths, self._dense[path])

    def _sums(
        self, index: int, stage: Stage, dense: Sequence[Tensor], off: Sequence[Tensor]
    ) -> Sums | None:
        """Of what the compressed block gives ``stage`` to read, and what it should return.

        None where they cannot be compared: tokens may have gone to another expert.
        """
        modules = [self._dense[path] for path in stage]
        sums = Sums()
        for batch, mask in enumerate(self._masks):
            real = RealTokens(mask)
            before = self._seen(index, batch, stage, modules, dense[batch])
            with self._in_place(index):
                after = self._seen(index, batch, stage, modules, off[batch])
            if before is None or after is None:
                return None
            (_, _, wanted), (x, returned, now) = before, after
            if any(y.shape != z.shape for y, z in zip(wanted, now, strict=True)):
                return None
            targets = (
                real.of(want.float() - had.float() + y.float())
                for want, had, y in zip(wanted, now, returned, strict=True)
            )
            sums.add(real.of(x), dict(zip(stage, targets, strict=True)))
        return sums

    def _seen(
        self, index: int, batch: int, stage: Stage, modules: Sequence[nn.Module], hidden: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor]] | None:
        """What the dense linears of ``stage`` read and return, and the sums that it goes into; None
        where one is not called."""
        readers = {place.module for place in stage.values() if place and place.module}
        seen = watch(
            lambda: self._blocks.run(index, batch, hidden),
            {modules[0], *readers}, modules, any(p and not p.module for p in stage.values()),
        )  # fmt: skip
        if not seen.returned.keys() >= set(modules) or not seen.read.keys() >= readers:
            return None
        returned = [seen.returned[module] for module in modules]
        sums = [
            y if place is None else seen.at(place.module)
            for place, y in zip(stage.values(), returned, strict=True)
        ]
        return seen.read[modules[0]], returned, sums

    def _fit(self, path: str, sums: Sums | None, ranks: Mapping[str, int | None]) -> None:
        """Without ``sums``, or where they tell nothing, a pair is narrowed as it stands and a
        matrix left to be factored for itself."""
        rank, joint = ranks[self._unit(path)], self._joint_of.get(path)
        assert rank is not None
        if joint is not None and self.made.keys() >= set(joint.paths):
            return  # narrowed as it stood
        try:
            if sums is not None and sums.tokens:
                self._fit_to(path, sums, rank, joint)
                return
        except torch.linalg.LinAlgError as error:
            log.info("%s is factored for itself: %s", path, error)
        if joint is not None:
            self._alone(joint, rank)

    def _alone(self, joint: Joint, rank: int) -> None:
        """The pair narrowed by what calibration told of the dense model."""
        first, second = (self._matrices[path] for path in joint.paths)
        before, behind = _as_it_is(first), _as_it_is(second)
        u, v = spectrum_of(joint, self._matrices, self._moments).factors(rank)
        self._values.pop(joint.first, None)
        if joint.kind == "scores":
            self._put_scores(joint, before, behind, u, v)
        else:
            self.made[joint.first] = self._narrowed(joint.first, before, u)
            made = _lifted(joint, second, v)
            self.made[joint.second] = self._reading(joint, made, behind.bias)

    def _fit_to(self, path: str, sums: Sums, rank: int, joint: Joint | None) -> None:
        if joint is None:
            self.made[path] = self._matrix(path, sums, rank)
        elif joint.kind == "values":
            if path == joint.first:  # whole, until what comes of it has been seen
                self._values[path] = found = self._moved(path, sums)
                self.made[path] = _linear(self._matrices[path], found)
            else:
                self._narrow_values(joint, sums, rank)
        elif path == joint.first:
            self._narrow_scores(joint, sums, rank)

    def _moved(self, path: str, sums: Sums) -> Moved:
        one = self._matrices[path]
        return moved(one.weight, one.linear.module.bias is not None, sums, path, RIDGE)

    def _matrix(self, path: str, sums: Sums, rank: int) -> nn.Module:
        one, found = self._matrices[path], self._moved(path, sums)
        stacked = found.weight.reshape(*one.lead, *one.shape)
        inputs = sums.inputs(found.bias is not None)
        u, v = fits.spectrum_of(stacked, inputs, self._moments[path].outputs).factors(rank)
        made = one.module(u, v, rank)
        made.method = "planned"
        if found.bias is not None:
            product = (v @ u).reshape(found.weight.shape)
            made.bias = _parameter(sums.bias(path, product), one)
        return made

    def _narrow_scores(self, joint: Joint, sums: Sums, rank: int) -> None:
        query, key = (self._moved(path, sums) for path in joint.paths)
        q = query.weight.reshape(*joint.shape, -1)
        moment = q @ sums.inputs(False) @ q.mT
        if query.bias is not None:
            bias = query.bias.reshape(*joint.shape, 1)
            crossed = (q @ sums.mean)[..., None] @ bias.mT
            moment = moment + crossed + crossed.mT + bias @ bias.mT
        u, v = spectrum_of_scores(joint, moment, self._moments).factors(rank)
        self._put_scores(joint, query, key, u, v)

    def _put_scores(self, joint: Joint, query: Moved, key: Moved, u: Tensor, v: Tensor) -> None:
        of_queries = u.repeat_interleave(joint.group, 0)
        self.made[joint.first] = self._narrowed(joint.first, query, of_queries)
        self.made[joint.second] = self._narrowed(joint.second, key, v.mT)

    def _narrow_values(self, joint: Joint, sums: Sums, rank: int) -> None:
        one = self._matrices[joint.second]
        has_bias = one.linear.module.bias is not None
        inputs, crossed = sums.inputs(has_bias), sums.crossed(joint.second, has_bias)
        u, v = spectrum_of_values(joint, inputs, one, self._moments).factors(rank)
        # Values of other tokens, an encoder's, were not fitted.
        value = self._values.pop(joint.first, None) or _as_it_is(self._matrices[joint.first])
        self.made[joint.first] = self._narrowed(joint.first, value, u)

        u = u.repeat_interleave(joint.group, 0)
        start = _lifted(joint, one, v).flatten(1)
        read = torch.block_diag(*u)  # from all features to all latents
        narrow = read @ inputs @ read.mT
        fitted = drawn_to(start, crossed @ read.mT - start @ narrow, narrow, RIDGE_OF_NARROWED)
        bias = sums.bias(joint.second, fitted @ read) if has_bias else None
        self.made[joint.second] = self._reading(joint, fitted.reshape(-1, len(u), rank), bias)

    def _reading(self, joint: Joint, weight: Tensor, bias: Tensor | None) -> NarrowInputLinear:
        """What reads heads with ``weight`` [out, H, r]."""
        one = self._matrices[joint.second]
        out_features, heads, rank = weight.shape
        with torch.device("meta"):
            made = NarrowInputLinear(out_features, heads, joint.head_dim, rank, bias=False)
        made.weight = _parameter(weight, one)
        if bias is not None:
            made.bias = _parameter(bias, one)
        return inherit(made, one.linear.module)

    def _narrowed(self, path: str, whole: Moved, change: Tensor) -> NarrowHeadsLinear:
        """Heads of ``whole`` behind ``change`` [heads, r, D]."""
        one = self._matrices[path]
        heads, rank, head_dim = change.shape
        weight = change @ whole.weight.reshape(heads, head_dim, -1)
        made = NarrowHeadsLinear(
            weight.shape[-1], heads, head_dim, rank, bias=False,
            device=one.weight.device, dtype=one.weight.dtype,
        )  # fmt: skip
        made.weight = _parameter(weight, one)
        if whole.bias is not None:
            made.bias = _parameter((change @ whole.bias.reshape(heads, head_dim, 1)).flatten(), one)
        return inherit(made, one.linear.module)


def _as_it_is(one: Matrices) -> Moved:
    bias = one.linear.module.bias
    return Moved(one.weight.double(), bias.double() if isinstance(bias, Tensor) else None)


def _lifted(joint: Joint, output: Matrices, lift: Tensor) -> Tensor:
    """The output projection [out, H, r] behind ``lift`` [heads, D, r]."""
    lifts = lift.repeat_interleave(joint.group, 0)
    weight = output.weight.double().reshape(-1, len(lifts), joint.head_dim)
    return torch.einsum("ohd,hdr->ohr", weight, lifts)


def _parameter(value: Tensor, one: Matrices) -> nn.Parameter:
    return nn.Parameter(value.to(one.weight.dtype).contiguous(), one.weight.requires_grad)


def _linear(one: Matrices, whole: Moved) -> nn.Linear:
    out_features, in_features = one.weight.shape
    with torch.device("meta"):
        made = nn.Linear(in_features, out_features, bias=False)
    made.weight = _parameter(whole.weight, one)
    if whole.bias is not None:
        made.bias = _parameter(whole.bias, one)
    return made
