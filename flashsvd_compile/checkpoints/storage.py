"""The tensors of a checkpoint by name, mapped into memory; nothing in a file is ever executed.

Read are one file or a directory: ``.safetensors``, sharded with an index or not, and ``.bin``,
``.pt`` and ``.pth`` that hold tensors only. PyTorch's files are pickles, opened with
``weights_only=True``: one that holds more than tensors is refused.
"""

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsvd_compile.checkpoints.errors import CheckpointError, listed, optional_module
from flashsvd_compile.checkpoints.replacing import interrupted

_INDEXES = {
    ".safetensors": "model.safetensors.index.json",
    ".bin": "pytorch_model.bin.index.json",
}
_PICKLES = (".bin", ".pt", ".pth")
# What trainers leave beside the weights.
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state).*")
# Dobi-SVD's factors in 8 bits, whose code book is another library's.
_DOBI_REMAPPED = "remapping_weight.pt"
# FlashSVD writes GPT-2's factors one file a layer, without the layer in the names.
_LAYER_FILE = re.compile(r"gpt2_block_(\d+)\.pt")

_CONVERT = """
A pickle of whole objects can run any code when it is read, so it is not opened. Convert it in the
environment of the tool that wrote it, if you trust the file:

    import torch
    from safetensors.torch import save_model
    saved = torch.load({path!r}, map_location="cpu", weights_only=False)
    model = saved["model"] if isinstance(saved, dict) else saved
    save_model(model, "model.safetensors")
    model.config.save_pretrained(".")"""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by their names in the files; ``config`` is config.json, empty where there is none.

    Tensors are views of mapped files: they must be copied before they outlive the loading.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open ``path``, a file or a directory.

    Raises `FileNotFoundError` where there is none and `CheckpointError` for a file that is
    truncated, lacks a tensor that its index names, or holds more than tensors.
    """
    path = Path(path)
    if not path.exists():
        old = interrupted(path)
        hint = f"; writing there was interrupted, what was there before is at {old}" if old else ""
        raise FileNotFoundError(f"no checkpoint at {path}{hint}")
    directory = path if path.is_dir() else path.parent
    if path.name == _DOBI_REMAPPED or (path.is_dir() and (path / _DOBI_REMAPPED).exists()):
        raise CheckpointError(
            f"{directory / _DOBI_REMAPPED} holds Dobi-SVD's factors remapped to 8 bits in a "
            "library's own code book, which is not read; save the model before it is remapped, "
            "or its factors dequantised, as safetensors"
        )
    tensors: dict[str, Tensor] = {}
    for file, expected in _files_of(path).items():
        held = _read(file)
        if lacking := [name for name in expected if name not in held]:
            raise CheckpointError(f"{file} lacks {listed(lacking)}, which the index puts there")
        for name, tensor in held.items():
            if name in tensors:
                raise CheckpointError(f"{name} is in several files of {path}, {file.name} the last")
            tensors[name] = tensor
    return Checkpoint(path, tensors, read_json(directory / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold an object, holds {type(found).__name__}")
    return found


def _files_of(path: Path) -> dict[Path, list[str]]:
    """The files with weights, each with the names that an index says it holds."""
    if not path.is_dir():
        is_index = path.name.endswith(".index.json")
        return _indexed(path) if is_index else {path: []}
    by_suffix = {
        suffix: sorted(
            file for file in path.glob(f"*{suffix}") if not _NO_WEIGHTS.fullmatch(file.name)
        )
        for suffix in (".safetensors", *_PICKLES)
    }
    found: list[Path] = []
    for suffix, files in by_suffix.items():
        index = path / _INDEXES.get(suffix, "")
        # Repositories have one model in both kinds of files, and often one kind is not fetched.
        if index.is_file() and (files or not any(by_suffix.values())):
            return _indexed_alone(index, files)
        if files:
            found = files
            break
    found += [f for f in by_suffix[".pt"] if _LAYER_FILE.fullmatch(f.name) and f not in found]
    if not found:
        raise CheckpointError(
            f"{path} holds no weights: expected .safetensors, or {', '.join(_PICKLES)}"
        )
    return {file: [] for file in found}


def _indexed_alone(index: Path, files: list[Path]) -> dict[Path, list[str]]:
    """As `_indexed`; raises where ``files`` has a whole model, too: one of the two is stale."""
    shards = _indexed(index)
    whole = index.parent / index.name.removesuffix(".index.json")
    if whole in files and whole not in shards:
        raise CheckpointError(
            f"{index.parent} holds {whole.name} and {index.name}, which names other files; pass "
            "the path of the one to read"
        )
    return shards


def _indexed(index: Path) -> dict[Path, list[str]]:
    """The shards of an index, all there, with the names of the tensors that belong into each."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map")
    shards: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index} puts {name} into {file!r}, which is no file name")
        shards.setdefault(index.parent / file, []).append(name)
    for shard, expected in shards.items():
        if not shard.exists():
            raise CheckpointError(f"{shard} is missing; it should hold {listed(expected)}")
    return shards


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix not in _PICKLES:
        raise CheckpointError(f"{file}: expected .safetensors or {', '.join(_PICKLES)}")
    tensors = _read_pickle(file)
    layer = _LAYER_FILE.fullmatch(file.name)
    return {f"h.{layer[1]}.{k}": v for k, v in tensors.items()} if layer else tensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    safetensors = optional_module("safetensors")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{file} is damaged{_cut_tensor(file)} ({error})") from error
    # Of tensors that share memory safetensors keeps one, and notes the names of the others.
    aliases = {alias: kept for alias, kept in metadata.items() if kept in tensors}
    return {alias: tensors[kept] for alias, kept in aliases.items()} | tensors


def _cut_tensor(file: Path) -> str:
    """``": it ends within x"`` for a file that is shorter than its header says, else empty."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            return ": it ends within its header"
        try:
            header = json.loads(opened.read(length))
            ends = sorted((x["data_offsets"][1], k) for k, x in header.items() if k[:2] != "__")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return ""
    cut = [name for end, name in ends if end > size - 8 - length]
    return f": it ends within or before {listed(cut)}" if cut else ""


def _read_pickle(file: Path) -> dict[str, Tensor]:
    is_zip = zipfile.is_zipfile(file)
    with file.open("rb") as opened:
        if opened.read(4) == b"PK\x03\x04" and not is_zip:
            raise CheckpointError(f"{file} is damaged: it ends before its table of contents")
    try:
        # Only archives can be mapped; older files are read.
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        convert = _CONVERT.format(path=str(file))
        raise CheckpointError(
            f"{file} holds more than tensors, or is no file of torch.{convert}"
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError) as error:
        raise CheckpointError(f"{file} is damaged ({error})") from error
    return _only_tensors(file, found)


def _only_tensors(file: Path, found: Any) -> dict[str, Tensor]:
    """A state dict, on its own or below one of the names under which trainers store it."""
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds a {type(found).__name__}, expected tensors by name")
    for name in ("state_dict", "model", "module"):
        if isinstance(found.get(name), dict):
            found = found[name]
    others = _names_of_others(found.items())
    if others:
        raise CheckpointError(
            f"{file}: {listed(others)} should be dense tensors, as all other entries"
        )
    return dict(found)


def _names_of_others(items: Iterable[tuple[Any, Any]]) -> list[str]:
    return [str(k) for k, v in items if not isinstance(k, str) or not _is_dense(v)]


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
