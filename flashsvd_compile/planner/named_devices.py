"""GPUs by name, for plans made where there is none.

Peaks are those of NVIDIA's data sheets: dense tensor-core rates of 16 bits accumulated in float32,
and boost clocks. What kernels reach of them is taken to be what an H100 was measured to reach.
"""

import difflib
from dataclasses import dataclass

import torch

from flashsvd_compile.planner.device import Device, device_for, gpu


@dataclass(frozen=True)
class DataSheet:
    """``sram_kib``: what a block may have; ``tflops``: by bytes an element."""

    generation: str
    multiprocessors: int
    sram_kib: int
    tflops: dict[int, float]
    gb_per_s: float
    ghz: float


DATA_SHEETS = {
    "h100": DataSheet("sm_90", 132, 227, {2: 989, 4: 67}, 3350, 1.755),
    "h200": DataSheet("sm_90", 132, 227, {2: 989, 4: 67}, 4800, 1.755),
    "a100": DataSheet("sm_80", 108, 163, {2: 312, 4: 19.5}, 2039, 1.41),
    "a10": DataSheet("sm_86", 72, 99, {2: 125, 4: 31.2}, 600, 1.695),
    "l4": DataSheet("sm_89", 58, 99, {2: 121, 4: 30.3}, 300, 2.04),
    "l40s": DataSheet("sm_89", 142, 99, {2: 362, 4: 91.6}, 864, 2.52),
    "rtx3090": DataSheet("sm_86", 82, 99, {2: 71, 4: 35.6}, 936, 1.695),
    "rtx4090": DataSheet("sm_89", 128, 99, {2: 165, 4: 82.6}, 1008, 2.52),
    "rtx5090": DataSheet("sm_120", 170, 99, {2: 209.5, 4: 104.8}, 1792, 2.407),
}  # fmt: skip
_MEASURED = DATA_SHEETS["h100"]


def device_named(name: str | torch.device) -> Device:
    """``"h100"``, ``"RTX 4090"``, ``"cpu"``, or a GPU of this machine: ``"cuda"``, ``"cuda:1"``.

    Raises ValueError for any other name, with the nearest right one, and for a GPU of this machine
    where it has none.
    """
    if (own := own_device(name)) is not None:
        return _present(own)
    plain = _plain(name)
    sheet = DATA_SHEETS.get(plain)
    if sheet is None:
        allowed = [*DATA_SHEETS, "cpu", "cuda"]
        nearest = difflib.get_close_matches(plain, allowed, n=1, cutoff=0)[0]
        raise ValueError(
            f"unknown device {name!r}; the nearest is {nearest!r} (allowed: {', '.join(allowed)})"
        )
    return gpu(
        plain,
        sheet.generation,
        sheet.multiprocessors,
        sheet.sram_kib * 1024,
        macs={size: sheet.tflops[size] / peak for size, peak in _MEASURED.tflops.items()},
        exps=sheet.multiprocessors * sheet.ghz / (_MEASURED.multiprocessors * _MEASURED.ghz),
        bytes_=sheet.gb_per_s / _MEASURED.gb_per_s,
    )


def own_device(name: str | torch.device) -> torch.device | None:
    """The device of this machine that ``name`` says; None for any other name."""
    if isinstance(name, torch.device):
        return name
    plain = _plain(name)
    is_own = plain == "cpu" or plain.partition(":")[0] == "cuda"
    return torch.device(plain) if is_own else None


def _plain(name: object) -> str:
    return str(name).lower().replace(" ", "").replace("-", "").replace("_", "")


def _present(device: torch.device) -> Device:
    if device.type == "cuda" and not torch.cuda.is_available():
        names = ", ".join(DATA_SHEETS)
        raise ValueError(f"no GPU here to be device {str(device)!r}; by name there are {names}")
    return device_for(device)
