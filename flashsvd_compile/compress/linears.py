"""Every linear layer of a model, and why some of them must stay as they are.

``nn.Linear`` and transformers' ``Conv1D`` (the same map, its weight stored transposed) are found
at every path that leads to them. Only plain ones can be replaced by factors: a subclass, a weight
that is computed from other tensors, quantised, or shared with another module means more than
``x Wᵀ + b``, so those stay dense, with the reason.
"""

import difflib
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Layer(Protocol):
    """Anything that the paths to it name; the first of them stands for it."""

    @property
    def paths(self) -> tuple[str, ...]: ...

    @property
    def path(self) -> str: ...


@dataclass(frozen=True)
class Linear:
    """A linear layer of the model, the ``paths`` to it, and its weight as [out, in].

    Where it cannot be factored, ``weight`` is None and ``obstacle`` says why.
    """

    paths: tuple[str, ...]
    module: nn.Module
    weight: Tensor | None
    weight_bytes: int
    obstacle: str

    @property
    def path(self) -> str:
        return self.paths[0]


def find_linears(model: nn.Module) -> list[Linear]:
    """All linear layers of ``model``, subclasses included, in the order of its modules."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    kinds = (nn.Linear,) if conv1d is None else (nn.Linear, conv1d)
    paths = module_paths(model)
    holders = holders_of(paths)
    linears = []
    for module, found in paths.items():
        if not isinstance(module, kinds):
            continue
        obstacle = _obstacle(module, kinds) or sharing(module, "weight", paths, holders)
        weight = None
        if not obstacle:
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.t()
        linears.append(
            Linear(tuple(found), module, weight, parameter_bytes(module.weight), obstacle)
        )
    return linears


def module_paths(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all paths to it."""
    paths: dict[nn.Module, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        paths[module].append(path)
    return paths


def replace_(model: nn.Module, paths: Iterable[str], module: nn.Module) -> None:
    """Put ``module`` at each of ``paths``."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


def model_bytes(model: nn.Module) -> int:
    """Size of all parameters in bytes, each counted once."""
    return sum(parameter_bytes(parameter) for parameter in model.parameters())


def parameter_bytes(parameter: Tensor) -> int:
    """Size in bytes; 0 for a parameter that a lazy module has yet to make."""
    return 0 if is_lazy(parameter) else parameter.numel() * parameter.element_size()


def select(
    linears: Sequence[Layer], include: Iterable[str] | None, exclude: Iterable[str] | None
) -> dict[str, str]:
    """Why the user left a layer out, by path; paths not in the result were chosen."""
    included = None if include is None else _matched("include", linears, include)
    excluded = set() if exclude is None else _matched("exclude", linears, exclude)
    left_out = {}
    for linear in linears:
        if linear.path in excluded:
            left_out[linear.path] = "excluded"
        elif included is not None and linear.path not in included:
            left_out[linear.path] = "not included"
    return left_out


def _matched(name: str, linears: Sequence[Layer], patterns: Iterable[str]) -> set[str]:
    if isinstance(patterns, str):
        raise TypeError(f"{name} must be a list of patterns, got the string {patterns!r}")
    matched: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{name} must hold strings, got {pattern!r}")
        hits = {x.path for x in linears if any(fnmatchcase(path, pattern) for path in x.paths)}
        if not hits:
            known = [path for linear in linears for path in linear.paths]
            nearest = difflib.get_close_matches(pattern, known, n=1, cutoff=0)
            hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
            raise ValueError(f"{name}: {pattern!r} matches no linear layer of the model{hint}")
        matched |= hits
    return matched


def _obstacle(module: Any, kinds: tuple[type[nn.Module], ...]) -> str:
    """What makes the module more than a plain linear; empty where nothing does."""
    if altered := altered_from(kinds, module, "linear", "weight is"):
        return altered
    if "weight" not in module._parameters:
        return "its weight is computed from other tensors"
    if module._parameters.keys() - {"weight", "bias"} or module._buffers or module._modules:
        return "it holds more than a weight and a bias"
    if type(module.weight) is not nn.Parameter:
        return f"its weight is a {type(module.weight).__qualname__}"
    if module.weight.dtype not in DTYPES:
        return f"its weight is {str(module.weight.dtype).removeprefix('torch.')}"
    if module.weight.numel() == 0:
        return "its weight is empty"
    return ""


def altered_from(
    kinds: tuple[type[nn.Module], ...], module: nn.Module, called: str, held: str
) -> str:
    """Why the module does not compute what ``kinds`` do from what it holds; empty where it does.

    ``called``: how the report names such a layer; ``held``: what it holds, with its verb.
    """
    if is_parametrized(module):
        return f"its {held} parametrized"
    if type(module) not in kinds:
        return f"{type(module).__qualname__} is not a plain {called}"
    return "its forward has been replaced" if "forward" in vars(module) else ""


# Where a parameter lies in memory; two modules that hold the same place share it.
_Place = tuple[torch.device, int]


def _place(parameter: Tensor) -> _Place | None:
    """None for what has no memory of its own to compare: meta, lazy and wrapped tensors."""
    if type(parameter) is not nn.Parameter or parameter.is_meta or parameter.numel() == 0:
        return None
    return parameter.device, parameter.data_ptr()


def holders_of(modules: Iterable[nn.Module]) -> dict[_Place, list[nn.Module]]:
    """The modules that hold each parameter themselves."""
    holders: dict[_Place, list[nn.Module]] = defaultdict(list)
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None and (place := _place(parameter)) is not None:
                holders[place].append(module)
    return holders


def sharing(
    module: nn.Module,
    name: str,
    paths: Mapping[nn.Module, list[str]],
    holders: Mapping[_Place, list[nn.Module]],
) -> str:
    """Who else holds the parameter, e.g. the embedding that an output layer is tied to."""
    place = _place(getattr(module, name))
    others = [] if place is None else [m for m in holders[place] if m is not module]
    return f"its {name} is shared with {paths[others[0]][0]}" if others else ""
