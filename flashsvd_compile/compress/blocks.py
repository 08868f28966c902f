"""The repeated blocks of a model, each to be run on its own, with inputs of one's choice.

Transformers keep their layers in a list and call them one after another: what the first tensor of
one's output is, the next one reads. That is looked for, not assumed.
"""

import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd_compile.compress.moments import called

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """How a block was called: everything but the hidden state, and where that belongs."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    at: int | str

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(self.at, str):
            return self.args, {**self.kwargs, self.at: hidden}
        return (*self.args[: self.at], hidden, *self.args[self.at + 1 :]), dict(self.kwargs)


@dataclass(frozen=True)
class Blocks:
    """``calls[batch][block]``; ``hidden[batch]``: what the first block reads."""

    paths: Sequence[str]
    modules: Sequence[nn.Module]
    calls: Sequence[Sequence[Call]]
    hidden: Sequence[Tensor]

    def run(self, block: int, batch: int, hidden: Tensor) -> Tensor:
        """What the next block would read."""
        args, kwargs = self.calls[batch][block].with_hidden(hidden)
        return _hidden_of(self.modules[block](*args, **kwargs))


@torch.no_grad()
def find_blocks(model: nn.Module, paths: Iterable[str], batches: Sequence[Any]) -> Blocks | None:
    """The blocks that hold most of the linears at ``paths``; None where they are not called one
    after another, once for each of ``batches``. The model has to be in evaluation mode."""
    for names, modules in _lists(model, list(paths)):
        calls, firsts = [], []
        last = None
        for batch in batches:
            seen = _record(model, modules, batch)
            if seen is None:
                break
            hidden, own, last = seen
            firsts.append(hidden)
            calls.append(own)
        blocks = Blocks(names, modules, calls, firsts)
        if len(calls) == len(batches) and last is not None and _repeats(blocks, last):
            return blocks
    return None


def _repeats(blocks: Blocks, last: Tensor) -> bool:
    """Whether the last batch makes ``last`` again: a block may depend on what ran before."""
    batch = len(blocks.hidden) - 1
    hidden = blocks.hidden[batch]
    try:
        for index in range(len(blocks.modules)):
            hidden = blocks.run(index, batch, hidden)
    except Exception as error:
        log.info("%s cannot be run again: %s", blocks.paths[0], error)
        return False
    return hidden.shape == last.shape and torch.allclose(hidden, last, rtol=1e-3, atol=1e-5)


def _lists(model: nn.Module, paths: Sequence[str]) -> list[tuple[list[str], list[nn.Module]]]:
    """Lists of modules that hold linears: first what has many of them in many parts."""
    found: list[tuple[float, list[str], list[nn.Module]]] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        names = [f"{path}.{name}" if path else name for name, _ in module.named_children()]
        held = [sum(linear.startswith(f"{name}.") for linear in paths) for name in names]
        if any(held):
            # A pipeline of an encoder and a head holds more than the encoder's list, in two parts.
            worth = sum(held) * (1 - 0.9 / sum(map(bool, held)))
            found.append((worth, names, list(module.children())))
    return [one[1:] for one in sorted(found, key=lambda one: -one[0])]


def _record(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Any
) -> tuple[Tensor, list[Call], Tensor] | None:
    """The hidden state that the first block read, the calls, and what the last one made; None where
    they are no chain."""
    seen: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    made: list[Tensor | None] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((module, args, kwargs))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        try:
            made.append(_hidden_of(output))
        except TypeError:
            made.append(None)

    with ExitStack() as stack:
        for block in blocks:
            hook = block.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(hook.remove)
            stack.callback(block.register_forward_hook(after).remove)
        called(model, batch)
    if [module for module, _, _ in seen] != list(blocks) or len(made) != len(seen):
        return None
    if any(_is_written_to(x) for _, args, kwargs in seen for x in (*args, *kwargs.values())):
        return None
    places = [
        None if hidden is None else _place_of(partial(operator.is_, hidden), args, kwargs)
        for hidden, (_, args, kwargs) in zip(made, seen[1:], strict=False)
    ]
    if len(blocks) == 1:
        places = [_place_of(torch.is_tensor, *seen[0][1:])]  # none before has to fit
    if not places or any(place is None or place != places[0] for place in places):
        return None
    at = places[0]
    calls, first = [], None
    for _, args, kwargs in seen:
        given = kwargs.get(at) if isinstance(at, str) else args[at]  # type: ignore[index]
        if not isinstance(given, Tensor):
            return None
        first = given if first is None else first
        call = Call(args, kwargs, at)  # type: ignore[arg-type]
        calls.append(replace(call, **_without_hidden(call)))
    assert first is not None
    assert made[-1] is not None
    return first, calls, made[-1]


def _is_written_to(given: Any) -> bool:
    """Caches and dicts, in which a block leaves something for the next one."""
    return not isinstance(given, Tensor) and hasattr(given, "update")


def _without_hidden(call: Call) -> dict[str, Any]:
    """Nothing of the activations is kept but what the first block reads."""
    if isinstance(call.at, str):
        return {"kwargs": {k: v for k, v in call.kwargs.items() if k != call.at}}
    return {"args": (*call.args[: call.at], None, *call.args[call.at + 1 :])}


def _place_of(
    is_it: Callable[[Any], bool], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> int | str | None:
    """Where the first argument that ``is_it`` was given."""
    places: list[int | str] = [*range(len(args)), *kwargs]
    given = zip(places, (*args, *kwargs.values()), strict=True)
    return next((place for place, x in given if is_it(x)), None)


def _hidden_of(output: Any) -> Tensor:
    first = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(first, Tensor):
        raise TypeError("a block's output does not begin with a tensor")
    return first


class _Enough(Exception):
    """All that was to be seen has been."""


@dataclass(frozen=True)
class Seen:
    """What modules read first, and return, in one run; ``result``: the run's, if it was wanted."""

    read: Mapping[nn.Module, Tensor]
    returned: Mapping[nn.Module, Tensor]
    result: Tensor | None

    def at(self, module: nn.Module | None) -> Tensor:
        """What ``module`` read, or else the result."""
        found = self.result if module is None else self.read[module]
        assert found is not None
        return found


def watch(
    run: Callable[[], Tensor],
    reads_of: Iterable[nn.Module] = (),
    returns_of: Iterable[nn.Module] = (),
    result: bool = False,
) -> Seen:
    """One ``run``, which ends as soon as all that is asked for is known."""
    readers, returners = set(reads_of), set(returns_of)
    read: dict[nn.Module, Tensor] = {}
    returned: dict[nn.Module, Tensor] = {}

    def check() -> None:
        if not result and len(read) == len(readers) and len(returned) == len(returners):
            raise _Enough

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        read[module] = args[0]
        check()

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        returned[module] = output
        check()

    with ExitStack() as stack:
        for module in readers:
            stack.callback(module.register_forward_pre_hook(before).remove)
        for module in returners:
            stack.callback(module.register_forward_hook(after).remove)
        try:
            return Seen(read, returned, run())
        except _Enough:
            return Seen(read, returned, None)
