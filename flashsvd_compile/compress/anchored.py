"""Factors fitted block after block, to what the compressed model really gives them to read.

In the order of the model, each linear is first moved to where it returns what the dense one does
from inputs that are off by now (a ridge regression towards its own weight, on the moments of both),
then truncated in the metric of the loss, and its bias moved by what is off in the mean. As in AA-SVD
and SAES-SVD (2026), with the outputs' metric and with heads that are narrowed on both sides.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd_compile.compress.blocks import Blocks, watch
from flashsvd_compile.compress.fits import Spectrum, drawn_to, spectrum_of
from flashsvd_compile.compress.joint import Joint
from flashsvd_compile.compress.joint_modules import NarrowHeadsLinear, NarrowInputLinear
from flashsvd_compile.compress.linears import replace_
from flashsvd_compile.compress.matrices import Matrices
from flashsvd_compile.compress.moments import Moments, RealTokens

# How strongly a matrix is drawn to its own weight, of its inputs' variances; all-MiniLM-L6-v2.
RIDGE = 0.03
RIDGE_OF_OUTPUTS = 0.003  # what reads narrowed heads has fewer inputs to fit


@dataclass
class _Sums:
    """Of inputs x and targets y over tokens, float64."""

    tokens: int = 0
    x: Any = 0.0
    xx: Any = 0.0
    y: dict[str, Any] = field(default_factory=dict)
    yx: dict[str, Any] = field(default_factory=dict)

    def add(self, x: Tensor, targets: Mapping[str, Tensor]) -> None:
        x = x.float()
        self.tokens += len(x)
        self.x = self.x + x.sum(0).double()
        self.xx = self.xx + (x.mT @ x).double()
        for name, target in targets.items():
            y = target.float()
            self.y[name] = self.y.get(name, 0.0) + y.sum(0).double()
            self.yx[name] = self.yx.get(name, 0.0) + (y.mT @ x).double()

    def inputs(self, centred: bool) -> Tensor:
        mean = self.x / self.tokens
        moment = self.xx / self.tokens
        return moment - torch.outer(mean, mean) if centred else moment

    def crossed(self, name: str, centred: bool) -> Tensor:
        moment = self.yx[name] / self.tokens
        if not centred:
            return moment
        return moment - torch.outer(self.y[name], self.x) / self.tokens**2

    def bias(self, name: str, weight: Tensor) -> Tensor:
        """What ``weight``'s products lack of the targets in the mean."""
        return (self.y[name] - weight @ self.x) / self.tokens


@dataclass(frozen=True)
class Moved:
    """A dense matrix and bias, moved to its new inputs."""

    weight: Tensor
    bias: Tensor | None


class Anchored:
    """Fits the modules of each block in turn; ``made``: by path, what takes the dense ones' places.

    The model is as it was between calls.
    """

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
        self._joint_of = {path: joint for joint in joints for path in joint.paths}
        self._dense = {path: one.linear.module for path, one in matrices.items()}
        self.made: dict[str, nn.Module] = {}

    @torch.no_grad()
    def fit(self, ranks: Mapping[str, int | None]) -> Iterator[str]:
        """Yields the path of each block when it is done. ``ranks``: of matrices by path and of
        joints by name, None for those that stay."""
        dense = compressed = list(self._blocks.hidden)
        for index, path in enumerate(self._blocks.paths):
            self._moved: dict[str, Moved] = {}
            self._sum_at: dict[str, nn.Module | None] = {}
            for stage in self._stages(index, dense[0]):
                wanted = [p for p in stage if ranks[self._unit(p)] is not None]
                if wanted:
                    sums = self._sums(index, wanted, dense, compressed)
                    for one in self._in_order(wanted):
                        self._fit(one, sums, ranks)
            runs = range(len(dense))
            dense_next = [self._blocks.run(index, i, dense[i]) for i in runs]
            with self._in_place():
                compressed = [self._blocks.run(index, i, compressed[i]) for i in runs]
            dense = dense_next
            yield path

    def _unit(self, path: str) -> str:
        return self._joint_of[path].name if path in self._joint_of else path

    def _stages(self, index: int, hidden: Tensor) -> list[list[str]]:
        """The block's linears as they are called, those that read the same together."""
        own = [p for p in self._matrices if p.startswith(f"{self._blocks.paths[index]}.")]
        path_of = {self._dense[path]: path for path in own}
        order: list[tuple[nn.Module, Any]] = []
        leaves = [m for m in self._blocks.modules[index].modules() if not list(m.children())]
        with ExitStack() as stack:
            for leaf in leaves:
                hook = leaf.register_forward_pre_hook(
                    lambda module, args: order.append((module, args[0]))
                )
                stack.callback(hook.remove)
            returned = watch(lambda: self._blocks.run(index, 0, hidden), (), path_of, True).returned
        stages: list[list[str]] = []
        last = None
        for place, (module, read) in enumerate(order):
            if module not in path_of:
                continue
            if read is not last:
                stages.append([])
            stages[-1].append(path_of[module])
            last = read
            y = returned[module]
            later = [
                m for m, x in order[place + 1 :]
                if x.shape == y.shape and x.data_ptr() != y.data_ptr()
            ]  # fmt: skip
            sum_at = later[0] if later else None
            self._sum_at[path_of[module]] = sum_at
            if not self._adds(index, hidden, module, sum_at):
                del self._sum_at[path_of[module]]
        return stages

    def _adds(self, index: int, hidden: Tensor, module: nn.Module, at: nn.Module | None) -> bool:
        """Whether what ``at`` reads, or the block returns, is the module's output and something
        that does not depend on it."""

        def read() -> Tensor:
            run = lambda: self._blocks.run(index, 0, hidden)  # noqa: E731
            seen = watch(run, () if at is None else (at,), (), at is None)
            found = seen.result if at is None else seen.read[at]
            assert found is not None
            return found

        before = read()
        moved: list[Tensor] = []

        def move(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            moved.append(output.flip(-1))
            return output + moved[0]

        hook = module.register_forward_hook(move)
        try:
            after = read()
        finally:
            hook.remove()
        if after.shape != moved[0].shape:
            return False
        return bool((after - before - moved[0]).norm() < 1e-3 * moved[0].norm())

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The model with what has been made."""
        try:
            for path, module in self.made.items():
                replace_(self._model, self._matrices[path].linear.paths, module)
            yield
        finally:
            for path in self.made:
                replace_(self._model, self._matrices[path].linear.paths, self._dense[path])

    def _sums(
        self, index: int, paths: Sequence[str], dense: Sequence[Tensor], off: Sequence[Tensor]
    ) -> _Sums:
        """Of what the compressed block reads at ``paths``, and the dense one returns there."""
        sums, modules = _Sums(), [self._dense[path] for path in paths]
        places = [self._sum_at.get(path, self._dense[path]) for path in paths]
        read_at = [m for m in places if m is not None and m not in modules]
        for batch, mask in enumerate(self._masks):
            real = RealTokens(mask)

            def found(hidden: Sequence[Tensor], batch: int = batch) -> tuple[Tensor, list[Tensor], list[Tensor]]:
                seen = watch(
                    lambda: self._blocks.run(index, batch, hidden[batch]),
                    [modules[0], *read_at], modules, None in places,
                )  # fmt: skip
                own = [seen.returned[m] for m in modules]
                sums = [
                    seen.result if at is None else seen.read[at] if at in read_at else y
                    for at, y in zip(places, own, strict=True)
                ]
                return seen.read[modules[0]], own, sums

            _, _, wanted = found(dense)
            with self._in_place():
                x, own, now = found(off)
            targets = {
                path: real.of(want - had + y)
                for path, want, had, y in zip(paths, wanted, now, own, strict=True)
            }
            sums.add(real.of(x), targets)
        return sums

    def _in_order(self, paths: Sequence[str]) -> list[str]:
        """One of both sides of narrowed scores."""
        seconds = {
            j.second for p in paths if (j := self._joint_of.get(p)) and j.kind == "scores"
        }
        return [path for path in paths if path not in seconds]

    def _fit(self, path: str, sums: _Sums, ranks: Mapping[str, int | None]) -> None:
        rank = ranks[self._unit(path)]
        assert rank is not None
        joint = self._joint_of.get(path)
        if joint is None:
            self._matrix(path, sums, rank)
        elif joint.kind == "scores":
            self._scores(joint, sums, rank)
        elif path == joint.first:
            self._moved[path] = moved = self._move(path, sums)
            self._install(path, _dense_linear(self._matrices[path], moved))
        else:
            self._values(joint, sums, rank)

    def _move(self, path: str, sums: _Sums) -> Moved:
        one = self._matrices[path]
        weight, centred = one.weight.double(), one.linear.module.bias is not None
        inputs = sums.inputs(centred)
        gap = sums.crossed(path, centred) - weight @ inputs
        weight = drawn_to(weight, gap, inputs, RIDGE)
        return Moved(weight, sums.bias(path, weight) if centred else None)

    def _matrix(self, path: str, sums: _Sums, rank: int) -> None:
        one, found = self._matrices[path], self._move(path, sums)
        stacked = found.weight.reshape(*one.lead, *one.shape)
        inputs = sums.inputs(found.bias is not None)
        u, v = spectrum_of(stacked, inputs, self._moments[path].outputs).factors(rank)
        made = one.module(u, v, rank)
        if found.bias is not None:
            product = (v @ u).reshape(found.weight.shape)
            made.bias = _parameter(sums.bias(path, product), one)
        self._install(path, made)

    def _scores(self, joint: Joint, sums: _Sums, rank: int) -> None:
        query, key = (self._move(path, sums) for path in joint.paths)
        shape = (joint.heads, joint.group, joint.head_dim, -1)
        q, k = query.weight.reshape(shape), key.weight.reshape(joint.heads, joint.head_dim, -1)
        moment = q @ sums.inputs(False) @ q.mT
        if query.bias is not None:
            bias, mean = query.bias.reshape(shape), (q @ (sums.x / sums.tokens))[..., None]
            moment = moment + bias @ bias.mT + bias @ mean.mT + mean @ bias.mT
        u, v = _narrowing(joint, moment, self._moments[joint.first].outputs).factors(rank)
        self._narrow(joint.first, joint, u[:, None] @ q, query.bias, u[:, None].expand(
            -1, joint.group, -1, -1))  # fmt: skip
        self._narrow(joint.second, joint, v.mT @ k, key.bias, v.mT)

    def _values(self, joint: Joint, sums: _Sums, rank: int) -> None:
        one, value = self._matrices[joint.second], self._moved[joint.first]
        centred = one.linear.module.bias is not None
        heads, shape = joint.heads * joint.group, (joint.heads, joint.group, joint.head_dim)
        inputs, crossed = sums.inputs(centred), sums.crossed(joint.second, centred)
        blocks = inputs.reshape(heads, joint.head_dim, heads, joint.head_dim)
        own = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        weight = one.weight.double().reshape(-1, heads, joint.head_dim)
        u, v = _narrowing(
            joint, own.reshape(*shape, -1), output_metric(joint, one, self._moments)
        ).factors(rank)
        v_weight = value.weight.reshape(joint.heads, joint.head_dim, -1)
        self._narrow(joint.first, joint, u @ v_weight, value.bias, u)

        u, v = (x.repeat_interleave(joint.group, 0) for x in (u, v))
        read = torch.block_diag(*u)  # [heads · rank, heads · head_dim]
        start = torch.einsum("ohd,hdr->ohr", weight, v).flatten(1)
        narrowed = read @ inputs @ read.mT
        gap = crossed @ read.mT - start @ narrowed
        fitted = drawn_to(start, gap, narrowed, RIDGE_OF_OUTPUTS)
        module = one.linear.module
        with torch.device("meta"):
            made = NarrowInputLinear(len(fitted), heads, joint.head_dim, rank, bias=False)
        made.weight = _parameter(fitted.reshape(len(fitted), heads, rank), one)
        if centred:
            made.bias = _parameter(sums.bias(joint.second, fitted @ read), one)
        made.train(module.training)
        self._install(joint.second, made)

    def _narrow(
        self, path: str, joint: Joint, weight: Tensor, bias: Tensor | None, change: Tensor
    ) -> None:
        """Install heads of ``weight`` [.., rank, in]; the dense bias goes through ``change``."""
        one, rank = self._matrices[path], weight.shape[-2]
        weight, change = weight.reshape(-1, *weight.shape[-2:]), change.reshape(
            -1, *change.shape[-2:])  # fmt: skip
        made = NarrowHeadsLinear(
            weight.shape[-1], len(weight), joint.head_dim, rank, bias=False,
            device=one.weight.device, dtype=one.weight.dtype,
        )  # fmt: skip
        made.weight = _parameter(weight, one)
        if bias is not None:
            narrowed = change @ bias.reshape(len(weight), joint.head_dim, 1)
            whole = bias.new_zeros(len(weight), joint.head_dim)
            whole[:, :rank] = narrowed.squeeze(-1)
            made.bias = _parameter(whole.flatten(), one)
        made.train(one.linear.module.training)
        self._install(path, made)

    def _install(self, path: str, module: nn.Module) -> None:
        self.made[path] = module


def _narrowing(joint: Joint, inputs: Tensor, outputs: Tensor | None) -> Spectrum:
    """The identity of each head, in the metric of its inputs [heads, group, D, D] and gradients."""
    assert outputs is not None
    eye = torch.eye(joint.head_dim, dtype=torch.float64, device=inputs.device)
    whole = outputs.double().reshape(inputs.shape).sum(1)
    return spectrum_of(eye.expand(joint.heads, -1, -1), inputs.mean(1), whole)


def output_metric(joint: Joint, one: Matrices, moments: Mapping[str, Moments]) -> Tensor:
    """Of gradients at the heads that ``joint.second`` reads, from those at its outputs."""
    outputs = moments[joint.second].outputs
    assert outputs is not None
    weight = one.weight.double().reshape(-1, joint.heads * joint.group, joint.head_dim)
    return torch.einsum("ohd,op,phe->hde", weight, outputs.double(), weight)


def joint_losses(
    joint: Joint, matrices: Mapping[str, Matrices], moments: Mapping[str, Moments]
) -> list[float]:
    """What narrowing to each rank from 0 on loses."""
    one = matrices[joint.first if joint.kind == "scores" else joint.second]
    found = moments[joint.first if joint.kind == "scores" else joint.second]
    assert found.inputs is not None
    inputs = found.inputs.double() / found.tokens
    shape = (joint.heads, joint.group, joint.head_dim, joint.head_dim)
    if joint.kind == "scores":
        heads = one.weight.double().reshape(*shape[:3], -1)
        moment, metric = heads @ inputs @ heads.mT, found.outputs
    else:
        count = joint.heads * joint.group
        blocks = inputs.reshape(count, joint.head_dim, count, joint.head_dim)
        moment = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).reshape(shape)
        metric = output_metric(joint, one, moments)
    by_rank = _narrowing(joint, moment, metric).sigma.square().sum(0)
    return [*by_rank.flip(0).cumsum(0).flip(0).tolist(), 0.0]


def _parameter(value: Tensor, one: Matrices) -> nn.Parameter:
    return nn.Parameter(value.to(one.weight.dtype).contiguous(), one.weight.requires_grad)


def _dense_linear(one: Matrices, moved: Moved) -> nn.Linear:
    out_features, in_features = one.weight.shape
    with torch.device("meta"):
        made = nn.Linear(in_features, out_features, bias=False)
    made.weight = _parameter(moved.weight, one)
    if moved.bias is not None:
        made.bias = _parameter(moved.bias, one)
    return made
