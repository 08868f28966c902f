"""A block's linears in the order of their calls, and the residual sums that they go into."""

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flashsvd_compile.compress.blocks import Blocks, watch

# Of what is added to an output, the share that may be missing where it goes: roundings of float32.
SAME = 1e-3
TINY = 1e-12


class Sum(NamedTuple):
    """Where an output plus a residual is read: by ``module``, or as what the block returns."""

    module: nn.Module | None


Stage = dict[str, Sum | None]


@torch.no_grad()
def stages_of(
    blocks: Blocks, index: int, hidden: Tensor, own: Mapping[nn.Module, str]
) -> list[Stage]:
    """The linears ``own`` of a block, those that read the same together, by path.

    ``hidden``: what the block reads of the first batch, on which this is found. What is not called
    then, or more than once, is in none, nor what reads other tokens, as experts do.
    """
    order: list[tuple[nn.Module, Tensor]] = []

    def seen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            order.append((module, args[0]))

    with ExitStack() as stack:
        for module in blocks.modules[index].modules():
            if not any(module.children()):
                stack.callback(module.register_forward_pre_hook(seen).remove)
        returned = watch(lambda: blocks.run(index, 0, hidden), (), own, True).returned
    stages: dict[int, Stage] = {}  # by what is read, which ``order`` keeps alive
    calls = Counter(module for module, _ in order)
    for place, (module, read) in enumerate(order):
        if module not in own or calls[module] > 1 or _tokens(read) != _tokens(hidden):
            continue
        y = returned[module]
        later = (
            Sum(m) for m, x in order[place + 1 :]
            if x.shape == y.shape and x.data_ptr() != y.data_ptr()
        )  # fmt: skip
        found = next(later, Sum(None))
        is_sum = _adds(blocks, index, hidden, module, found)
        stages.setdefault(id(read), {})[own[module]] = found if is_sum else None
    return list(stages.values())


def _tokens(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _adds(blocks: Blocks, index: int, hidden: Tensor, module: nn.Module, at: Sum) -> bool:
    """Whether what lies there is the module's output and something that does not depend on it."""

    def read() -> Tensor:
        readers = () if at.module is None else (at.module,)
        seen = watch(lambda: blocks.run(index, 0, hidden), readers, (), at.module is None)
        return seen.at(at.module)

    before = read()
    added: list[Tensor] = []

    def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        other = output.flip(-1)
        # As large as what it is added to, so that it does not drown in roundings.
        scale = before.double().norm() / other.double().norm().clamp_min(TINY)
        added.append(other * float(scale))
        return output + added[-1]

    hook = module.register_forward_hook(add)
    try:
        after = read()
    finally:
        hook.remove()
    if len(added) != 1 or after.shape != added[0].shape:
        return False
    gap = (after.double() - before.double() - added[0].double()).norm()
    same = max(SAME, 8 * torch.finfo(after.dtype).eps)
    return bool(gap < same * added[0].double().norm())
