"""The layouts of other tools, as tables of names, and how a checkpoint's own is found.

``svdllm`` and ``flashsvd``'s loader differ in a dot, ``asvd`` and ``dobisvd`` in nothing but what
their letters mean. Linears whose names end in ``_proj`` lose that in some layouts, so both are
looked up.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flashsvd_compile.checkpoints import flashsvd_v1
from flashsvd_compile.checkpoints.basis_sharing import complete_bases
from flashsvd_compile.checkpoints.errors import CheckpointError, nearest
from flashsvd_compile.checkpoints.rules import Parts, Role, Rule, collect

Tensors = Mapping[str, Tensor]

_STEM = ("{at}{stem}_proj", "{at}{stem}")
# A bias stored where the dense layer had it, whatever the factors are called.
_BIAS_IN_PLACE = Rule(r"(?P<at>.+)\.bias", ("{at}",), "up_bias", beside=True)


def _module(name: str, role: Role, bias_role: Role) -> tuple[Rule, ...]:
    """A factor that is a module called ``name`` below the linear's path."""
    at = ("{at}",)
    return (
        Rule(rf"(?P<at>.+)\.{name}\.weight", at, role),
        Rule(rf"(?P<at>.+)\.{name}\.bias", at, bias_role),
    )


def _beside(name: str, role: Role, bias_role: Role) -> tuple[Rule, ...]:
    """A factor that is a module beside the linear's place: ``q_u_proj`` for ``q_proj``."""
    return (
        Rule(rf"(?P<at>(?:.+\.)?)(?P<stem>\w+)_{name}\.weight", _STEM, role),
        Rule(rf"(?P<at>(?:.+\.)?)(?P<stem>\w+)_{name}\.bias", _STEM, bias_role),
    )


def _unchanged(tensors: Tensors, config: Mapping[str, Any], linears: Collection[str]) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Layout:
    """``prepare`` brings a checkpoint's tensors into the form that the rules read."""

    name: str
    rules: tuple[Rule, ...]
    prepare: Callable[[Tensors, Mapping[str, Any], Collection[str]], Tensors] = _unchanged


LAYOUTS = (
    Layout("svdllm", (*_beside("v_proj", "down", "down_bias"),
                      *_beside("u_proj", "up", "up_bias"))),
    Layout("asvd", (*_module("BLinear", "down", "down_bias"),
                    *_module("ALinear", "up", "up_bias"))),
    Layout("dobisvd", (*_module("ALinear", "down", "down_bias"),
                       *_module("BLinear", "up", "up_bias"))),
    Layout(
        "basis_sharing",
        (
            Rule(r"(?P<at>(?:.+\.)?)(?P<stem>\w+)_basis\.weight", _STEM, "down"),
            # The other factor keeps the name of the dense layer.
            Rule(r"(?P<at>.+)\.weight", ("{at}",), "up", beside=True),
        ),
        complete_bases,
    ),
    Layout(
        "palu",
        (
            *_module("VT", "down", "down_bias"),
            Rule(r"(?P<at>.+)\.U(?:_list)?\.(?P<group>\d+)\.weight", ("{at}",), "up",
                 block="{group}"),
            Rule(r"(?P<at>.+)\.U(?:_list)?\.(?P<group>\d+)\.bias", ("{at}",), "up_bias",
                 block="{group}"),
        ),
    ),
    Layout(
        "flashsvd",
        (
            *_module("v_proj", "down", "down_bias"), *_module("u_proj", "up", "up_bias"),
            *_module("ALinear", "down", "down_bias"), *_module("BLinear", "up", "up_bias"),
            *flashsvd_v1.RULES,
        ),
        flashsvd_v1.renamed,
    ),
)  # fmt: skip

NATIVE = "native"
FORMATS = ("auto", NATIVE, *(layout.name for layout in LAYOUTS))


@dataclass(frozen=True)
class Reading:
    """A checkpoint as one layout reads it: factors by the path of their linear, and the rest."""

    layout: Layout
    factors: Mapping[str, Parts]
    rest: Tensors

    @property
    def num_factors(self) -> int:
        """Tensors that only this kind of layout has; biases and dense names count for none."""
        return sum(
            len(parts.by_role["down"]) + len(parts.by_role["up"]) for parts in self.factors.values()
        )


def validate_format(name: str) -> None:
    if name not in FORMATS:
        raise ValueError(
            f"format must be one of {FORMATS}, got {name!r}{nearest(str(name), FORMATS)}"
        )


def readings(
    tensors: Tensors, config: Mapping[str, Any], linears: Collection[str], prefix: str
) -> list[Reading]:
    """Every layout that finds factors, the one that finds most first."""
    found = [_read(layout, tensors, config, linears, prefix) for layout in LAYOUTS]
    found = [reading for reading in found if reading.factors]
    return sorted(found, key=lambda reading: -reading.num_factors)


def _read(
    layout: Layout,
    tensors: Tensors,
    config: Mapping[str, Any],
    linears: Collection[str],
    prefix: str,
) -> Reading:
    prepared = layout.prepare(tensors, config, linears)
    factors = collect(prepared, (*layout.rules, _BIAS_IN_PLACE), linears, prefix)
    taken = {name for parts in factors.values() for name in parts.names}
    return Reading(layout, factors, {k: v for k, v in prepared.items() if k not in taken})


def chosen(name: str, found: list[Reading]) -> list[Reading]:
    """The readings to try for ``format=name``, in order; raises where there is none."""
    if not found:
        raise CheckpointError(
            "no factors found: no tensor's name is that of a factor of one of the model's linears "
            f"in any of the formats {', '.join(layout.name for layout in LAYOUTS)}; dense "
            "checkpoints are read by transformers"
        )
    most = [reading for reading in found if reading.num_factors == found[0].num_factors]
    if name == "auto":
        return most
    named = [reading for reading in found if reading.layout.name == name]
    if not named or named[0].num_factors < found[0].num_factors:
        formats = " or ".join(repr(reading.layout.name) for reading in most)
        path, parts = next(iter(most[0].factors.items()))
        raise CheckpointError(
            f"format={name!r}, but the names of the factors are those of {formats}: {path} has "
            f"{', '.join(parts.names)}"
        )
    return named
