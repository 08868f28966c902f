"""Pairs of linears with nothing but heads between them: query with key, value with output.

    q·k  is the same for  q → M⁻ᵀ q, k → M k        o(Σ p v)  for  v → M v, o's columns → M⁻¹

with any invertible M for each head; not where a rotation, a norm or a cache's rounding stands
between. So that is tried, in float64 and with random M, on a copy of the block, and once more on
the whole model, of which other blocks may read the heads: what leaves both as they were may be
narrowed together (``joint_modules.py``).
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flashsvd_compile.compress.blocks import Blocks
from flashsvd_compile.compress.heads import Projections
from flashsvd_compile.compress.matrices import Matrices
from flashsvd_compile.compress.moments import called, first_tensor

log = logging.getLogger(__name__)

# A block that rounds to float32 on its way leaves 1e-7; one in which something stands between is
# off by its own size.
SAME = 1e-4
SAME_AT_THE_END = 1e-3  # of a whole model in float32
ROWS = 2  # of a batch, to try with


@dataclass(frozen=True)
class Joint:
    """``first`` is query or value, ``second`` key or output. ``heads`` of keys and values, each
    read by ``group`` heads of queries."""

    kind: Literal["scores", "values"]
    first: str
    second: str
    heads: int
    group: int
    head_dim: int

    @property
    def name(self) -> str:
        return f"{self.first} × {self.second}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of what queries have."""
        return self.heads, self.group, self.head_dim

    @property
    def paths(self) -> tuple[str, str]:
        return self.first, self.second


@torch.no_grad()
def find_joints(
    blocks: Blocks, matrices: Mapping[str, Matrices], projections: Sequence[Projections]
) -> list[Joint]:
    """All pairs among ``matrices`` that may be narrowed together, in the order of the model."""
    found = []
    for index, path in enumerate(blocks.paths):
        own = [p for p in projections if p.query.startswith(f"{path}.")]
        if not own:
            continue
        inside = [p for p in matrices if p.startswith(f"{path}.")]
        try:
            trial = _Trial(blocks, index)
            for heads in own:
                found += _joints_of(heads, inside, matrices, trial)
        except Exception as error:  # a block that does not run in float64 is none to narrow
            log.info("heads of %s are not narrowed: %s", path, error)
    return found


@torch.no_grad()
def unseen_outside(
    model: nn.Module, joints: Sequence[Joint], matrices: Mapping[str, Matrices], batch: Any
) -> list[Joint]:
    """Those of ``joints`` whose changes leave all of the model's output as it is, too: what one
    block makes of a head may be read by others."""
    output = first_tensor(called(model, batch))
    expected = output.double()
    same = max(SAME_AT_THE_END, 8 * torch.finfo(output.dtype).eps)

    def leave(tried: Sequence[Joint]) -> bool:
        with ExitStack() as stack:
            for joint in tried:
                modules = [matrices[path].linear.module for path in joint.paths]
                stack.enter_context(_changed(joint, *modules))
            gap = (first_tensor(called(model, batch)).double() - expected).norm()
        return bool(gap <= same * expected.norm())

    if leave(joints):
        return list(joints)
    return [joint for joint in joints if leave([joint])]


@contextmanager
def _changed(joint: Joint, first: nn.Module, second: nn.Module | None) -> Iterator[None]:
    """Heads changed on the side of ``first``, and back on that of ``second``, if it is given."""
    modules = [module for module in (first, second) if module is not None]
    kept = [(p, p.data) for module in modules for p in module.parameters()]
    weight: Any = first.weight
    exact = _change(joint)
    change, back = (x.to(weight.device, weight.dtype) for x in (exact, torch.linalg.inv(exact)))
    try:
        if joint.kind == "scores":
            _change_rows(first, change.repeat_interleave(joint.group, 0))
        else:
            _change_rows(first, change)
        if second is not None and joint.kind == "scores":
            _change_rows(second, back.mT)
        elif second is not None:
            _change_columns(second, back.repeat_interleave(joint.group, 0))
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def _change(joint: Joint) -> Tensor:
    """A well-conditioned matrix for each head of keys or values."""
    generator = torch.Generator().manual_seed(0)
    shape = (joint.heads, joint.head_dim, joint.head_dim)
    q, _ = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
    return (
        q * (0.5 + 1.5 * torch.rand(shape[:2], generator=generator, dtype=torch.float64))[:, None]
    )


def _joints_of(
    heads: Projections, paths: Sequence[str], matrices: Mapping[str, Matrices], trial: "_Trial"
) -> list[Joint]:
    def joint(kind: Literal["scores", "values"], first: str, second: str) -> Joint:
        group = heads.num_heads // heads.num_kv_heads
        return Joint(kind, first, second, heads.num_kv_heads, group, heads.head_dim)

    found = []
    if heads.query in paths and heads.key in paths:
        scores = joint("scores", heads.query, heads.key)
        if trial.leaves(scores):
            found.append(scores)
    if heads.value in paths:
        width = heads.num_heads * heads.head_dim
        taken = {heads.query, heads.key, heads.value}
        for path in paths:
            if path in taken or matrices[path].weight.shape[1] != width:
                continue
            values = joint("values", heads.value, path)
            if trial.leaves(values):
                return [*found, values]
    return found


class _Trial:
    """A block in float64, and what it makes of a few real rows."""

    def __init__(self, blocks: Blocks, index: int) -> None:
        self._prefix = f"{blocks.paths[index]}."
        self._block = copy.deepcopy(blocks.modules[index]).double()
        hidden, call = blocks.hidden[0], blocks.calls[0][index]
        self._args, self._kwargs = _narrowed(call.with_hidden(hidden), len(hidden))
        self._expected = self._run()

    def _run(self) -> Tensor:
        output = self._block(*self._args, **self._kwargs)
        first = output[0] if isinstance(output, (tuple, list)) else output
        return first.double()

    def leaves(self, joint: Joint) -> bool:
        """Whether the block stays the same under changes that cancel in heads, and only so."""
        first, second = (self._module(path) for path in joint.paths)
        calls = self._calls(first, second)
        if sorted(id(module) for module, _ in calls) != sorted(map(id, (first, second))):
            return False
        if joint.kind == "scores" and calls[0][1] is not calls[1][1]:
            return False
        with _changed(joint, first, None):
            alone = self._gap()
        with _changed(joint, first, second):
            return bool(self._gap() < SAME < alone)

    def _calls(self, *modules: nn.Module) -> list[tuple[nn.Module, Any]]:
        """Each call of ``modules``, and what it reads."""
        calls: list[tuple[nn.Module, Any]] = []
        with ExitStack() as stack:
            for module in modules:
                hook = module.register_forward_pre_hook(
                    lambda module, args: calls.append((module, args[0]))
                )
                stack.callback(hook.remove)
            self._run()
        return calls

    def _gap(self) -> float:
        gap = (self._run() - self._expected).norm() / self._expected.norm()
        return float(gap) if torch.isfinite(gap) else float("inf")

    def _module(self, path: str) -> Any:
        return self._block.get_submodule(path.removeprefix(self._prefix))


def _narrowed(given: Any, rows: int) -> Any:
    """A few rows of all that has as many as the batch, in float64."""
    if isinstance(given, Tensor):
        few = given[:ROWS] if given.dim() > 1 and given.shape[0] == rows else given
        return few.double() if few.is_floating_point() else few
    if isinstance(given, Mapping):
        return {key: _narrowed(value, rows) for key, value in given.items()}
    if isinstance(given, (tuple, list)) and type(given) in (tuple, list):
        return type(given)(_narrowed(value, rows) for value in given)
    return given


def _is_transposed(module: nn.Module) -> bool:
    return not isinstance(module, nn.Linear)  # transformers' Conv1D


def _change_rows(module: Any, change: Tensor) -> None:
    """The outputs of head h multiplied by ``change[h]``."""
    weight = module.weight.data.t() if _is_transposed(module) else module.weight.data
    changed = torch.einsum("hij,hjc->hic", change, weight.unflatten(0, change.shape[:2]))
    changed = changed.flatten(0, 1)
    module.weight.data = changed.t() if _is_transposed(module) else changed
    if module.bias is not None:
        bias = module.bias.data.view(change.shape[:2])
        module.bias.data = torch.einsum("hij,hj->hi", change, bias).flatten()


def _change_columns(module: Any, change: Tensor) -> None:
    """Made to read heads that were multiplied by the inverses of ``change[h]``."""
    weight = module.weight.data.t() if _is_transposed(module) else module.weight.data
    changed = torch.einsum("ohj,hji->ohi", weight.unflatten(1, change.shape[:2]), change)
    changed = changed.flatten(1)
    module.weight.data = changed.t() if _is_transposed(module) else changed
