"""`save_pretrained`: a factored model of transformers → safetensors and a config.json."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flashsvd_compile.checkpoints import native
from flashsvd_compile.checkpoints.errors import CheckpointError, listed, optional_module
from flashsvd_compile.checkpoints.replacing import replacing
from flashsvd_compile.checkpoints.skeleton import skeleton_like
from flashsvd_compile.checkpoints.storage import read_json

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
    transformers = optional_module("transformers")
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(
            f"model must be one of transformers, got {type(model).__qualname__}; save the state "
            "dict of other modules, and pass the module to load_checkpoint as base"
        )
    name = type(model).__name__
    if getattr(transformers, name, type(model)) is not type(model):
        raise TypeError(f"model is a {name}, but not that of transformers, which would be loaded")
    directory = Path(directory).resolve()  # a link stays, what it leads to is replaced
    _check_target(directory)
    modules = native.describe(model, skeleton_like(model))
    state, tied = _distinct(model.state_dict())
    block = {"format_version": native.VERSION, "modules": modules, "tied": tied}
    with replacing(directory, lambda name: _OWN_FILES.fullmatch(name) is not None) as new:
        _write_tensors(state, new, max_shard_size)
        _write_json(new / "config.json", _config(model) | {"flashsvd": block})
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            _write_json(new / "generation_config.json", json.loads(generation.to_json_string()))


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


def _distinct(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, in memory of its own, and tied names by the one that is kept."""
    on_meta = [name for name, tensor in state.items() if tensor.is_meta]
    if on_meta:
        raise CheckpointError(f"{listed(on_meta)} on the meta device; load the model first")
    kept: dict[Any, str] = {}
    storages = set()
    distinct, tied = {}, {}
    for name, tensor in state.items():
        key: Any = name
        if tensor.numel():
            place = (tensor.device, tensor.data_ptr())
            key = (*place, tensor.dtype, tensor.shape, tensor.stride())
        if key in kept:
            tied[name] = kept[key]
            continue
        kept[key] = name
        storage = tensor.untyped_storage()
        is_alone = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in storages
        storages.add(storage.data_ptr())
        contiguous = tensor.contiguous()
        # Views into others' memory are copied: a file holds every tensor for itself.
        distinct[name] = contiguous if is_alone else contiguous.clone()
    return distinct, tied


def _write_tensors(state: dict[str, Tensor], into: Path, max_shard_size: int | str) -> None:
    split = optional_module("huggingface_hub").split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    save_file = optional_module("safetensors.torch").save_file
    for file, names in split.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, into / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(into / "model.safetensors.index.json", index)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
