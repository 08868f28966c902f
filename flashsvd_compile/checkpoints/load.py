"""`load_checkpoint` and `from_pretrained`: files → a model in eval mode, dense weights never made.

Both start from a model on the meta device, put low-rank modules in the place of linears, and then
give every parameter its tensor. They differ in who says which linears are factored: the names and
shapes of the tensors, in other tools' files, or the config, in ours.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd_compile.checkpoints import native
from flashsvd_compile.checkpoints.errors import CheckpointError, optional_module
from flashsvd_compile.checkpoints.factors import Factors, assemble
from flashsvd_compile.checkpoints.layouts import (
    NATIVE,
    Reading,
    chosen,
    readings,
    validate_format,
)
from flashsvd_compile.checkpoints.names import prefix_of
from flashsvd_compile.checkpoints.placing import (
    Placer,
    check_complete,
    place_factors,
    place_tensors,
)
from flashsvd_compile.checkpoints.skeleton import skeleton_of
from flashsvd_compile.checkpoints.storage import Checkpoint, read_checkpoint, read_json
from flashsvd_compile.compress.linears import Linear, find_linears


def load_checkpoint(path: str | Path, base: Any = None, format: str = "auto") -> nn.Module:
    """Read a factored checkpoint, of another tool or our own, as a model in eval mode.

    Args:
        path: a directory, or one file: ``.safetensors``, an index of shards, or ``.bin``, ``.pt``
            or ``.pth`` with nothing but tensors in it.
        base: what the model is: a module (on the meta device if you like; it is left as it is), a
            config of transformers, or the name or directory of a model. By default what the
            config.json beside the weights says, tools' names for known model types included.
        format: ``"auto"``, ``"native"``, ``"svdllm"``, ``"asvd"``, ``"dobisvd"``,
            ``"basis_sharing"``, ``"palu"`` or ``"flashsvd"``.

    Ranks are those of the stored shapes; what a config says of them is not used. The shapes also
    decide which of two matrices is the down factor. Factors are cast to the dtype of most of the
    dense weights (tools store float32 factors beside half-precision weights); all other tensors
    keep theirs. Bases that layers share stay one parameter. Groups of heads whose ranks differ
    (Palu) are padded with zeros to the largest, which is exact.

    Raises `CheckpointError` for damaged files, pickles of code, other formats than the one that is
    named, factors that do not fit, and tensors that are missing or left over; `FileNotFoundError`;
    `ImportError` where safetensors or transformers is needed and not installed.
    """
    validate_format(format)
    checkpoint = read_checkpoint(path)
    if native.is_native(checkpoint.config):
        if format not in ("auto", NATIVE):
            raise CheckpointError(
                f"format={format!r}, but the flashsvd block in {checkpoint.path}'s config.json is "
                "that of 'native'"
            )
        return _load_native(checkpoint, base, None, None)
    if format == NATIVE:
        raise CheckpointError(
            f"format='native', but {checkpoint.path} has no config.json with a flashsvd block; "
            "use format='auto' for other tools' checkpoints"
        )
    stored, dtype = checkpoint.tensors, _usual_dtype(checkpoint.tensors.values())
    model = skeleton_of(base, checkpoint.config, stored, dtype)
    linears = _linears_by_path(model)
    found = readings(stored, checkpoint.config, linears, prefix_of(model))
    reading, factors = _fitting(format, chosen(format, found), found, linears)

    usual = _usual_dtype(reading.rest.values()) or dtype
    if usual != dtype:  # most values are factors', and buffers were computed in their dtype
        model = skeleton_of(base, checkpoint.config, stored, usual)
        linears = _linears_by_path(model)
    placer = Placer()
    for at, factored in factors.items():
        place_factors(model, linears[at], factored, reading.layout.name, usual, placer)
    place_tensors(model, reading.rest, None, placer)
    return _finished(model, checkpoint, usual)


def from_pretrained(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Load what `save_pretrained` has written, in eval mode; dense weights are never made.

    Args:
        directory: the one that was saved to.
        dtype: of all floating-point tensors; by default each has the one that it was saved with.
        device: where to load to, by default the CPU.

    Raises as `load_checkpoint` does.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
    checkpoint = read_checkpoint(directory)
    if not native.is_native(checkpoint.config):
        raise CheckpointError(
            f"{directory} has no config.json with a flashsvd block; load_checkpoint reads other "
            "tools' checkpoints"
        )
    return _load_native(checkpoint, None, dtype, device)


def mapped_model(checkpoint: Checkpoint, base: Any) -> nn.Module:
    """The dense model of ``checkpoint`` in eval mode, its weights views of the mapped files.

    ``base`` and what is raised are those of `load_checkpoint`.
    """
    dtype = _usual_dtype(checkpoint.tensors.values())
    model = skeleton_of(base, checkpoint.config, checkpoint.tensors, dtype)
    place_tensors(model, checkpoint.tensors, None, Placer(copies=False))
    return _finished(model, checkpoint, dtype)


def _load_native(
    checkpoint: Checkpoint,
    base: Any,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> nn.Module:
    usual = dtype or _usual_dtype(checkpoint.tensors.values())
    model = skeleton_of(base, checkpoint.config, checkpoint.tensors, usual, is_exact=True)
    native.rebuild_(model, checkpoint.config)
    tensors = native.with_tied(checkpoint.tensors, checkpoint.config)
    place_tensors(model, tensors, dtype, Placer(device))
    if device is not None:
        model.to(device)  # buffers that are computed, not stored
    return _finished(model, checkpoint, usual)


def _linears_by_path(model: nn.Module) -> dict[str, Linear]:
    return {path: linear for linear in find_linears(model) for path in linear.paths}


def _fitting(
    name: str, candidates: list[Reading], found: list[Reading], linears: dict[str, Linear]
) -> tuple[Reading, dict[str, Factors]]:
    """The reading whose letters mean what the shapes say; else the first, if shapes decide all.

    Raises `CheckpointError` where the shapes contradict the format that was named and another has
    the same names and fits, and where two factors could be multiplied in either order and nothing
    else tells which.
    """
    made = [(reading, _assembled(reading, linears)) for reading in candidates]
    orders = [{f.order for f in factors.values()} for _, factors in made]
    for one, seen in zip(made, orders, strict=True):
        if "as told" in seen and "swapped" not in seen:
            return one
    if name != "auto":
        _check_label(name, candidates, found, linears)
    reading, factors = made[0]
    if "either" in orders[0] and (len(made) > 1 or "swapped" in orders[0]):
        path = next(path for path, factored in factors.items() if factored.order == "either")
        raise CheckpointError(
            f"{path}: {' and '.join(reading.factors[path].names[:2])} can be multiplied in either "
            "order; name the format that the file has, which is one of "
            f"{', '.join(other.layout.name for other in found)}"
        )
    return made[0]


def _check_label(
    name: str, candidates: list[Reading], found: list[Reading], linears: dict[str, Linear]
) -> None:
    """Raise `CheckpointError` where another format than ``name`` has these names and shapes."""
    for other in found:
        if other in candidates or other.num_factors < candidates[0].num_factors:
            continue
        orders = {f.order for f in _assembled(other, linears).values()}
        if "as told" in orders and "swapped" not in orders:
            path, parts = next(iter(other.factors.items()))
            raise CheckpointError(
                f"format={name!r}, but {' and '.join(parts.names[:2])} have the shapes of "
                f"{other.layout.name!r} at {path}"
            )


def _assembled(reading: Reading, linears: dict[str, Linear]) -> dict[str, Factors]:
    factors = {}
    for path, parts in reading.factors.items():
        linear = linears[path]
        if linear.weight is None:
            raise CheckpointError(
                f"{path} cannot be factored: {linear.obstacle}; {parts.names[0]} is for it"
            )
        out_features, in_features = linear.weight.shape
        factors[path] = assemble(path, out_features, in_features, parts)
        if getattr(linear.module, "bias", None) is not None and factors[path].bias is None:
            raise CheckpointError(
                f"{path} has a bias in the model, and there is none beside {', '.join(parts.names)}"
            )
    return factors


def _usual_dtype(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """The floating-point dtype that most values have, None where there are none."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0] if counts else None


def _finished(model: Any, checkpoint: Checkpoint, dtype: torch.dtype | None) -> nn.Module:
    check_complete(model)
    if dtype is not None and hasattr(getattr(model, "config", None), "dtype"):
        model.config.dtype = dtype
    directory = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    generation = read_json(directory / "generation_config.json")
    if generation and getattr(model, "generation_config", None) is not None:
        kind = optional_module("transformers").GenerationConfig
        model.generation_config = kind.from_dict(generation)
    return model.eval()
