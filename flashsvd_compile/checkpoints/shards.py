"""Safetensors files of limited size, written while their tensors come."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from flashsvd_compile.checkpoints.errors import optional_module


@dataclass
class Shards:
    """Files in ``directory`` of at most ``max_bytes`` each, but for a tensor that is larger alone.

    No more than one file's tensors are held. A tensor has its memory for itself.
    """

    directory: Path
    max_bytes: int
    _held: dict[str, Tensor] = field(default_factory=dict)
    _held_bytes: int = 0
    _names: list[list[str]] = field(default_factory=list)  # by file
    _total_bytes: int = 0

    def __contains__(self, name: object) -> bool:
        return name in self._held or any(name in names for names in self._names)

    def add(self, name: str, tensor: Tensor) -> None:
        if self._held and self._held_bytes + tensor.nbytes > self.max_bytes:
            self._write()
        self._held[name] = tensor
        self._held_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Name the files as transformers does: one, or as many as there are and an index."""
        if self._held or not self._names:
            self._write()
        count = len(self._names)
        if count == 1:
            self._file(0).rename(self.directory / "model.safetensors")
            return
        files: dict[str, str] = {}
        for number, names in enumerate(self._names):
            file = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self._file(number).rename(self.directory / file)
            files |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": files}
        write_json(self.directory / "model.safetensors.index.json", index)

    def _write(self) -> None:
        save_file = optional_module("safetensors.torch").save_file
        save_file(self._held, self._file(len(self._names)), metadata={"format": "pt"})
        self._names.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    def _file(self, number: int) -> Path:
        return self.directory / f"model-{number + 1:05}.safetensors"


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
