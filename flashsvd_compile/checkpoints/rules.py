"""What a layout says of names: which tensor is which factor of which linear.

    Rule(r"(?P<at>.+)\\.BLinear\\.weight", ("{at}",), "down")

reads ``model.layers.0.mlp.up_proj.BLinear.weight`` as the down factor of the linear at
``model.layers.0.mlp.up_proj``. A rule takes a name only where the model has a linear at one of its
targets, so that ``self_attn.v_proj.weight`` of a dense layer is never a factor of ``self_attn``.
Roles are what the layout's letters say; `factors` lets the shapes decide.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from flashsvd_compile.checkpoints.names import resolve

Role = Literal["down", "up", "down_bias", "up_bias"]

# Axes of a stored tensor, one letter each: heads, rank, in, out, and 1 for an axis of size 1.
_AXES: dict[Role, str] = {"down": "ri", "up": "or", "down_bias": "r", "up_bias": "o"}


@dataclass(frozen=True)
class Rule:
    """Names that match ``pattern`` in full have ``role`` for the first of ``targets`` there is.

    Targets and ``block`` are filled with the pattern's groups. ``block`` tells the parts of a
    linear that has several of a role: groups of heads; query, key and value of a fused one.
    ``beside`` rules only add to linears of which another rule has found a factor.
    """

    pattern: str
    targets: tuple[str, ...]
    role: Role
    axes: str = ""
    block: str = ""
    beside: bool = False

    @property
    def stored_axes(self) -> str:
        return self.axes or _AXES[self.role]


@dataclass(frozen=True)
class Part:
    """A tensor under its stored name, its axes as the layout says."""

    name: str
    tensor: Tensor
    axes: str


@dataclass
class Parts:
    """All that was found of one linear: by role, then by block."""

    by_role: dict[Role, dict[str, Part]] = field(default_factory=lambda: defaultdict(dict))

    @property
    def names(self) -> list[str]:
        return [part.name for parts in self.by_role.values() for part in parts.values()]


def collect(
    tensors: Mapping[str, Tensor], rules: Iterable[Rule], linears: Collection[str], prefix: str
) -> dict[str, Parts]:
    """The factors among ``tensors``, by the path of the linear that they stand for."""
    found: dict[str, Parts] = defaultdict(Parts)
    taken: set[str] = set()
    for rule in sorted(rules, key=lambda rule: rule.beside):
        pattern = re.compile(rule.pattern)
        targets = set(found) if rule.beside else linears
        for name, tensor in tensors.items():
            match = None if name in taken else pattern.fullmatch(name)
            path = match and _target(match.groupdict(), rule, targets, prefix)
            if match and path:
                block = rule.block.format(**match.groupdict())
                part = Part(name, tensor, rule.stored_axes)
                # The first rule counts: a bias beside the factors is no second one of its factor.
                if found[path].by_role[rule.role].setdefault(block, part) is part:
                    taken.add(name)
    return dict(found)


def _target(
    groups: Mapping[str, str], rule: Rule, linears: Collection[str], prefix: str
) -> str | None:
    candidates = (resolve(t.format(**groups), linears, prefix) for t in rule.targets)
    return next((path for path in candidates if path is not None), None)
