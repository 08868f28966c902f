"""`save_pretrained`: a factored model of transformers → safetensors and a config.json."""

import json
import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flashsvd_compile.checkpoints import native
from flashsvd_compile.checkpoints.errors import CheckpointError, listed, optional_module
from flashsvd_compile.checkpoints.replacing import replacing
from flashsvd_compile.checkpoints.shards import Shards, write_json
from flashsvd_compile.checkpoints.skeleton import skeleton_like
from flashsvd_compile.checkpoints.storage import read_json
from flashsvd_compile.options import parse_bytes

_OWN_FILES = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(generation_)?config\.json"
)


def save_pretrained(
    model: nn.Module, directory: str | Path, max_shard_size: int | str = "5GB"
) -> None:
    """Write ``model`` so that `from_pretrained` makes it again, without its dense weights.

    Args:
        model: one of transformers, with low-rank modules in the place of any of its linears. Where
            its class is your own, `load_checkpoint` loads it, with such a model as base.
        directory: where to; a new one, an empty one, or one that this function has written, which
            is replaced. Other files in it (a tokenizer) stay.
        max_shard_size: bytes of one file at most, or a string as ``"5GB"``.

    The directory is written beside its place and renamed: a failure leaves what was there.

    Raises `TypeError` for a model that is none of transformers', `CheckpointError` for one with
    modules that the format cannot say or weights on the meta device, `FileExistsError` for a
    directory with other contents, `ValueError` for the working directory, one above it and a mount
    point, which cannot be renamed, `ImportError` where a package is not installed.
    """
    with saving(model, directory, max_shard_size):
        pass


@contextmanager
def saving(model: nn.Module, directory: str | Path, max_shard_size: int | str) -> Iterator[Shards]:
    """Files to write tensors of ``model`` to, by their names in its state dict; what is not there
    at the end is written then, as `save_pretrained` does, which says what is raised.

    Where modules on the meta device have taken the place of others by then, their tensors have to
    be written, those that they have more than one name for by the first; others' may still be.
    """
    transformers = optional_module("transformers")
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(
            f"model must be one of transformers, got {type(model).__qualname__}; save the state "
            "dict of other modules, and pass the module to load_checkpoint as base"
        )
    name = type(model).__name__
    if getattr(transformers, name, type(model)) is not type(model):
        raise TypeError(f"model is a {name}, but not that of transformers, which would be loaded")
    max_bytes = parse_bytes("max_shard_size", max_shard_size)
    if max_bytes is None:
        raise TypeError("max_shard_size must be a number of bytes, or a string as '5GB'")
    directory = Path(directory).resolve()  # a link stays, what it leads to is replaced
    _check_target(directory)
    skeleton = skeleton_like(model)
    native.describe(model, skeleton)  # before anything is written
    with replacing(directory, lambda name: _OWN_FILES.fullmatch(name) is not None) as new:
        shards = Shards(new, max_bytes)
        yield shards
        modules = native.describe(model, skeleton)
        state = model.state_dict(keep_vars=True)
        lacking, tied = _distinct(state, shards)
        storages: set[int] = set()
        for key in lacking:
            shards.add(key, _alone(state[key].detach(), storages))
        shards.finish()
        block = {"format_version": native.VERSION, "modules": modules, "tied": tied}
        write_json(new / "config.json", _config(model) | {"flashsvd": block})
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            write_json(new / "generation_config.json", json.loads(generation.to_json_string()))


def _check_target(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; pass a directory")
    if directory.is_mount() or Path.cwd().is_relative_to(directory):
        raise ValueError(
            f"{directory} is a mount point, the working directory or above it; pass one below, "
            "as the directory is replaced"
        )
    if any(directory.iterdir()) and not native.is_native(read_json(directory / "config.json")):
        raise FileExistsError(
            f"{directory} holds other files; pass a new or empty directory, or one that "
            "save_pretrained has written"
        )


def _config(model: Any) -> dict[str, Any]:
    config = json.loads(model.config.to_json_string())
    for stale in ("auto_map", "quantization_config"):
        config.pop(stale, None)
    return config | {"architectures": [type(model).__name__]}


def _distinct(
    state: Mapping[str, Tensor], written: Container[object]
) -> tuple[list[str], dict[str, str]]:
    """Names of the tensors that are not ``written``, each once, and tied names by the one that is
    kept."""
    kept: dict[Any, str] = {}
    tied = {}
    for name, tensor in state.items():
        key: Any = name
        if tensor.is_meta:
            key = id(tensor)
        elif tensor.numel():
            place = (tensor.device, tensor.data_ptr())
            key = (*place, tensor.dtype, tensor.shape, tensor.stride())
        if kept.setdefault(key, name) != name:
            tied[name] = kept[key]
    lacking = [name for name in kept.values() if name not in written]
    if on_meta := [name for name in lacking if state[name].is_meta]:
        raise CheckpointError(f"{listed(on_meta)} on the meta device; load the model first")
    return lacking, tied


def _alone(tensor: Tensor, storages: set[int]) -> Tensor:
    """Contiguous; views into others' memory are copied: a file holds every tensor for itself.

    ``storages``: where those lie that were written before.
    """
    storage = tensor.untyped_storage()
    is_alone = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in storages
    storages.add(storage.data_ptr())
    contiguous = tensor.contiguous()
    return contiguous if is_alone else contiguous.clone()
