"""Fits what kernels reach of a device's rates to times that were measured.

    python -m bench.choices --only feed_forward --count 140
    python -m bench.fit_efficiency bench/results/choices_cuda.json --device h100

Searches one number of ``flashsvd_compile/planner/efficiency.py`` after the other, up and down by
ever smaller factors, for the least error of predictions (in logarithms; of slow lowerings less) and
the least that is lost by picking what is predicted to be the fastest. Prints what it finds.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from flashsvd_compile.kernels.feed_forward_whole_tiles import WholeTile
from flashsvd_compile.kernels.tiles import TileConfig

from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.efficiency import Efficiency
from flashsvd_compile.planner.feed_forward_cost import (
    FeedForwardShape,
    row_blocks_seconds,
    streamed_seconds,
    streamed_whole_seconds,
    unfused_seconds,
)
from flashsvd_compile.planner.named_devices import device_named

FACTORS = (2.0, 1.4, 1.15, 1.05, 1.02)
SWEEPS = 4

# Errors beyond this count in proportion, not in square: some kernels are out of the model's reach.
LARGE_ERROR = 0.1

# Of the mean loss of picks, beside the mean error.
WEIGHT_OF_LOSS = 1.0

Row = dict[str, Any]


def predicted_ms(row: Row, device: Device) -> dict[str, float]:
    """Of every lowering that was measured."""
    lifts = (row["rank"],) * (2 if row["gated"] else 1)
    of = FeedForwardShape(
        row["batch"] * row["rows"], row["width"], lifts, row["rank"], 2,
        (row["hidden"], row["hidden"]),
    )  # fmt: skip
    found: dict[str, float] = {}
    for name in row["ms"]:
        tile, block_rows = row["plans"][name]["tile"], row["plans"][name]["block_rows"]
        if name == "unfused":
            seconds = unfused_seconds(of, device)
        elif name == "row_blocks":
            block_tile = TileConfig(*tile) if tile else None
            seconds = row_blocks_seconds(of, device, block_rows, block_tile)
        elif name == "streamed":
            seconds = streamed_seconds(of, device, TileConfig(*tile))
        else:
            seconds = streamed_whole_seconds(of, device, WholeTile(*tile))
        found[name] = seconds * 1e3
    return found


def loss_of(row: Row, device: Device) -> tuple[float, float]:
    """The error of its predictions, and what their pick loses."""
    predicted, best = predicted_ms(row, device), min(row["ms"].values())
    error = 0.0
    for name, ms in row["ms"].items():
        off = abs(math.log(predicted[name] / ms))
        weight = min(1.0, 2 * best / ms)
        error += weight * min(off * off / (2 * LARGE_ERROR), off - LARGE_ERROR / 2)
    pick = min(predicted, key=predicted.__getitem__)
    return error, row["ms"][pick] / best - 1


def objective(rows: list[Row], device: Device) -> float:
    losses = [loss_of(row, device) for row in rows]
    return sum(error + WEIGHT_OF_LOSS * lost for error, lost in losses) / len(rows)


def names(of: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths to the numbers that feed-forwards depend on."""
    for field in fields(of):
        value = getattr(of, field.name)
        if is_dataclass(value):
            yield from names(value, (*prefix, field.name))
        elif field.name != "attention":
            yield (*prefix, field.name)


def scaled(of: Any, path: tuple[str, ...], factor: float) -> Any:
    first, *rest = path
    value = getattr(of, first)
    return replace(of, **{first: scaled(value, tuple(rest), factor) if rest else value * factor})


def fitted(rows: list[Row], device: Device) -> Efficiency:
    best = objective(rows, device)
    for factor in FACTORS:
        for _ in range(SWEEPS):
            before = best
            for path in names(device.efficiency):
                for by in (factor, 1 / factor):
                    efficiency = scaled(device.efficiency, path, by)
                    tried = replace(device, efficiency=efficiency)
                    if (found := objective(rows, tried)) < best:
                        best, device = found, tried
            print(f"factor {factor}: {best:.5f}", flush=True)
            if best > before - 1e-5:
                break
    return device.efficiency


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--device", default="h100")
    given = parser.parse_args()
    rows = [
        row
        for path in given.results
        for row in json.loads(path.read_text())["rows"]
        if row["kind"] == "feed_forward" and row["dtype"] == "bfloat16"
    ]
    device = device_named(given.device)
    efficiency = fitted(rows, device)
    print(efficiency)
    lost = sorted(loss_of(row, replace(device, efficiency=efficiency))[1] for row in rows)
    print(f"{len(rows)} sites: median loss {lost[len(lost) // 2]:.1%}, worst {lost[-1]:.1%}")


if __name__ == "__main__":
    main()
