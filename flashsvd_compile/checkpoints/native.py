"""Our own format: a model of transformers, and a ``flashsvd`` block in its config.json.

    "flashsvd": {
        "format_version": 1,
        "modules": {
            "encoder.layer.0.attention.self.query":
                {"kind": "per_head", "rank": 4, "num_heads": 3, "head_dim": 8,
                 "bias": true, "method": "svd"}
        },
        "tied": {"lm_head.weight": "model.embed_tokens.weight"}
    }

``modules`` are those that differ from what the config makes: low-rank ones, and plain linears that
`merge_` has put where there were others. Tensors have the names of the model's own state dict; of
tied ones one is stored, and ``tied`` says which it stands for.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd_compile.checkpoints.errors import CheckpointError, listed, nearest
from flashsvd_compile.compress.joint_modules import NarrowHeadsLinear, NarrowInputLinear
from flashsvd_compile.compress.linears import find_linears, replace_
from flashsvd_compile.compress.modules import (
    FusedPerHeadLowRankLinear,
    LowRankLinear,
    PerHeadLowRankLinear,
)

VERSION = 1

# kind -> the module, and those of its arguments that its linear does not tell
_KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "matrix": (LowRankLinear, ("rank",)),
    "per_head": (PerHeadLowRankLinear, ("num_heads", "head_dim", "rank")),
    "fused_per_head": (FusedPerHeadLowRankLinear, ("num_parts", "num_heads", "head_dim", "rank")),
    "narrow_heads": (NarrowHeadsLinear, ("num_heads", "head_dim", "rank")),
    "narrow_input": (NarrowInputLinear, ("num_heads", "head_dim", "rank")),
    "linear": (nn.Linear, ()),
}


def is_native(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("flashsvd"), dict)


def describe(model: nn.Module, skeleton: nn.Module) -> dict[str, dict[str, Any]]:
    """The modules of ``model`` that ``skeleton``, made from its config, has otherwise, by path.

    Raises `CheckpointError` where one differs in a way that the format has no word for.
    """
    made = dict(skeleton.named_modules(remove_duplicate=False))
    linears = {path for linear in find_linears(skeleton) for path in linear.paths}
    held = dict(model.named_modules(remove_duplicate=False))
    entries = {}
    module: Any
    for path, module in held.items():
        if path in made and _is_alike(module, made[path]):
            continue
        kind = next((k for k, (cls, _) in _KINDS.items() if type(module) is cls), None)
        if kind is None or path not in linears:
            raise CheckpointError(
                f"{path or 'the model'} is a {type(module).__qualname__}, which neither its config "
                f"makes nor this format can say; allowed in a linear's place: {', '.join(_KINDS)}"
            )
        out_features, in_features = _sizes(made[path])
        if (module.out_features, module.in_features) != (out_features, in_features):
            raise CheckpointError(
                f"{path} is [{module.out_features}, {module.in_features}], the config makes "
                f"[{out_features}, {in_features}]"
            )
        entries[path] = _entry(kind, module)
    if lacking := [path for path in made if path not in held]:
        raise CheckpointError(f"the config makes {listed(lacking)}, which the model does not have")
    return entries


def _is_alike(module: nn.Module, made: nn.Module) -> bool:
    """Whether the config makes just this, as far as its own tensors tell."""

    def shapes(m: nn.Module) -> dict[str, Any]:
        stored = {k: b for k, b in m._buffers.items() if k not in m._non_persistent_buffers_set}
        return {k: None if t is None else t.shape for k, t in (m._parameters | stored).items()}

    return type(module) is type(made) and shapes(module) == shapes(made)


def _entry(kind: str, module: Any) -> dict[str, Any]:
    entry = {name: getattr(module, name) for name in _KINDS[kind][1]}
    entry |= {"kind": kind, "bias": module.bias is not None}
    return entry if kind == "linear" else entry | {"method": module.method}


def rebuild_(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Put the modules of the ``flashsvd`` block in place of linears, on the meta device.

    Raises `CheckpointError` for a block that this version cannot read.
    """
    block = config["flashsvd"]
    version = block.get("format_version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"format_version {version!r} of the flashsvd block in config.json cannot be read, "
            f"allowed are 1 to {VERSION}; a newer flashsvd_compile may read it"
        )
    linears = {path: linear for linear in find_linears(model) for path in linear.paths}
    for path, entry in _objects(block, "modules", dict).items():
        if path not in linears:
            raise CheckpointError(
                f"config.json: {path} is no linear of the model{nearest(path, linears)}"
            )
        replace_(model, [path], _module(path, entry, linears[path].module))


def _objects(block: Mapping[str, Any], name: str, kind: type) -> dict[str, Any]:
    """What the block has under ``name``, with values of ``kind``; empty where it has nothing."""
    found = block.get(name, {})
    if not isinstance(found, dict) or not all(isinstance(x, kind) for x in found.values()):
        raise CheckpointError(
            f"config.json: {name} of the flashsvd block must be an object with values of type "
            f"{kind.__name__}, got {found!r:.80}"
        )
    return found


def _module(path: str, entry: Mapping[str, Any], linear: Any) -> Any:
    kind, bias = entry.get("kind"), entry.get("bias")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise CheckpointError(
            f"config.json: {path} has kind {kind!r}, allowed are {', '.join(_KINDS)}"
            f"{nearest(str(kind), _KINDS)}"
        )
    cls, names = _KINDS[kind]
    out_features, in_features = _sizes(linear)
    sizes = [entry.get(name) for name in names]
    if "num_heads" not in names:
        sizes.insert(0, out_features)
    if any(type(size) is not int for size in sizes):
        raise CheckpointError(f"config.json: {path} needs whole numbers for {', '.join(names)}")
    if not isinstance(bias, bool):
        raise CheckpointError(f"config.json: {path}: bias must be true or false, got {bias!r}")
    try:
        with torch.device("meta"):
            wide = out_features if cls is NarrowInputLinear else in_features
            module: Any = cls(wide, *sizes, bias=bias)
    except ValueError as error:
        raise CheckpointError(f"config.json: {path}: {error}") from error
    if (module.out_features, module.in_features) != (out_features, in_features):
        raise CheckpointError(
            f"config.json: {path} is [{out_features}, {in_features}], which {dict(entry)} is not"
        )
    if isinstance(module, NarrowHeadsLinear):  # no checkpoint holds it
        module.lift = torch.eye(module.head_dim, module.rank, dtype=linear.weight.dtype)
    if kind != "linear":
        module.method = str(entry.get("method", ""))
    return module


def _sizes(linear: Any) -> tuple[int, int]:
    """Features out and in; transformers' Conv1D stores its weight transposed."""
    rows, columns = linear.weight.shape
    return (rows, columns) if isinstance(linear, nn.Linear) else (columns, rows)


def with_tied(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """``tensors`` with the names that the block says are tied to stored ones."""
    tied = _objects(config["flashsvd"], "tied", str)
    lacking = [kept for kept in tied.values() if kept not in tensors]
    if lacking:
        raise CheckpointError(f"no tensors for {listed(lacking)}, to which others are tied")
    return {**{alias: tensors[kept] for alias, kept in tied.items()}, **tensors}
