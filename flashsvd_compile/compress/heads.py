"""Which linears project to attention heads, and how many: read off the modules' own attributes.

An attention module holds its query, key and value projections as siblings (``q_proj``,
``k_proj``, ``v_proj``) or fused into one (``c_attn``), and says how its heads are laid out in
attributes (``num_heads``, ``head_dim``) or in its config. A layout is believed only where names,
attributes and weight shapes agree:

    q: out = H·D        k, v: out = H_kv·D, H_kv divides H        fused: out = 3·H·D

``BertSelfAttention(num_attention_heads=12, attention_head_size=64)`` with ``query``, ``key`` and
``value`` of 768 outputs gives ``HeadLayout(parts=1, num_heads=12, head_dim=64)`` for each of the
three. Anything else is no attention projection, and is factored as one matrix.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

# How models spell the three projections, and one that fuses them.
_SPELLINGS = (
    ("query", "key", "value"),
    *(
        tuple(form.format(letter) for letter in "qkv")
        for form in ("{}", "{}_proj", "{}_lin", "to_{}", "w{}", "linear_{}", "project_{}")
    ),
    ("query_proj", "key_proj", "value_proj"),
)
_FUSED = ("c_attn", "qkv", "qkv_proj", "Wqkv", "query_key_value")

# What an attention module, or its config, calls these numbers; the first found counts.
_NUM_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
_NUM_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim", "d_kv")


@dataclass(frozen=True)
class HeadLayout:
    """The output features of a projection: ``parts`` × ``num_heads`` × ``head_dim``."""

    parts: int
    num_heads: int
    head_dim: int


@dataclass(frozen=True)
class Projections:
    """The paths of a query, a key and a value projection that belong together."""

    query: str
    key: str
    value: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class _Declared:
    """What the attention module says of its heads; None where it says nothing."""

    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None


def find_head_layouts(model: nn.Module, out_features: Mapping[str, int]) -> dict[str, HeadLayout]:
    """Layouts of those linears that project to heads, by path.

    ``out_features`` has the linears that may be factored, by their path in ``model``.
    """
    layouts: dict[str, HeadLayout] = {}
    for path, children, declared in _holders(model, out_features):
        for name, layout in _layouts_of(children, declared).items():
            layouts[f"{path}{name}"] = layout
    return layouts


def find_projections(model: nn.Module, out_features: Mapping[str, int]) -> list[Projections]:
    """Query, key and value side by side, each a linear of its own, as `find_head_layouts`."""
    found = []
    for path, children, declared in _holders(model, out_features):
        for names in _SPELLINGS:
            if not all(name in children for name in names):
                continue
            layouts = _split_layouts(names, [children[name] for name in names], declared)
            if layouts:
                query, key = layouts[names[0]], layouts[names[1]]
                q, k, v = (f"{path}{name}" for name in names)
                heads = query.num_heads, key.num_heads, query.head_dim
                found.append(Projections(q, k, v, *heads))
    return found


def _holders(
    model: nn.Module, out_features: Mapping[str, int]
) -> Iterator[tuple[str, dict[str, int], _Declared]]:
    """Modules that hold linears: a prefix of their paths, those linears' outputs by name, and what
    the module says of its heads."""
    configs = {path: getattr(module, "config", None) for path, module in model.named_modules()}
    for path, module in model.named_modules():
        children = {
            name: out_features[child]
            for name, _ in module.named_children()
            if (child := f"{path}.{name}" if path else name) in out_features
        }
        if not children:
            continue
        declared = _declared(module, _nearest_config(configs, path))
        yield f"{path}." if path else "", children, declared


def _layouts_of(children: Mapping[str, int], declared: _Declared) -> dict[str, HeadLayout]:
    found: dict[str, HeadLayout] = {}
    for names in _SPELLINGS:
        if all(name in children for name in names):
            found |= _split_layouts(names, [children[name] for name in names], declared)
    for name in _FUSED:
        if name in children and (layout := _fused_layout(children[name], declared)):
            found[name] = layout
    return found


def _split_layouts(
    names: tuple[str, ...], outs: list[int], declared: _Declared
) -> dict[str, HeadLayout]:
    """Layouts of query, key and value; empty where the numbers contradict each other."""
    q_out, k_out, v_out = outs
    head_dim = declared.head_dim or _exact_quotient(q_out, declared.num_heads)
    num_heads = _exact_quotient(q_out, head_dim)
    num_kv_heads = _exact_quotient(k_out, head_dim)
    if (
        head_dim is None
        or num_heads is None
        or num_kv_heads is None
        or declared.num_heads not in (None, num_heads)
        or declared.num_kv_heads not in (None, num_kv_heads)
        or num_heads % num_kv_heads
        or v_out != k_out
    ):
        return {}
    heads = (num_heads, num_kv_heads, num_kv_heads)
    return {name: HeadLayout(1, h, head_dim) for name, h in zip(names, heads, strict=True)}


def _fused_layout(out: int, declared: _Declared) -> HeadLayout | None:
    """The layout of query, key and value fused with equal sizes; grouped heads have none."""
    head_dim = declared.head_dim or _exact_quotient(out, 3 * (declared.num_heads or 0))
    num_heads = _exact_quotient(out, 3 * (head_dim or 0))
    if (
        head_dim is None
        or num_heads is None
        or declared.num_heads not in (None, num_heads)
        or declared.num_kv_heads not in (None, num_heads)
    ):
        return None
    return HeadLayout(3, num_heads, head_dim)


def _exact_quotient(a: int, b: int | None) -> int | None:
    return a // b if b and a % b == 0 else None


def _declared(module: nn.Module, config: Any) -> _Declared:
    def number(names: tuple[str, ...]) -> int | None:
        for owner in (module, config):
            for name in names:
                value = getattr(owner, name, None)
                if type(value) is int and value > 0:  # a list, in models whose stages differ
                    return value
        return None

    return _Declared(number(_NUM_HEADS), number(_NUM_KV_HEADS), number(_HEAD_DIM))


def _nearest_config(configs: Mapping[str, Any], path: str) -> Any:
    """The config of the module at ``path``, or of the closest module above that has one."""
    while True:
        if configs.get(path) is not None:
            return configs[path]
        if not path:
            return None
        path = path.rpartition(".")[0]
