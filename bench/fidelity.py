"""What compression leaves of a real model: every method of `compress_`, at equal bytes.

    python -m bench.fidelity [--keep 0.7 0.5] [--sentences 256]

all-MiniLM-L6-v2, the linears of its encoder. Sentences of Python's own documentation: some
calibrate, 256 others are held out; the number is mean |Δcos|, how far the cosines of all pairs of
held-out embeddings move. Seconds are those of calibration and factoring. The last row of each share
is told what the embeddings are (the mean over tokens, normalised), the others only the model's own
output.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import flashsvd_compile as fsc
from bench.measure import environment, write_results
from bench.sentences import (
    batches,
    documentation_sentences,
    embed,
    embedding,
    loaded,
    similarity_shift,
)

HELD_OUT = 256
LAYERS = ["encoder.*"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--sentences", type=int, default=256, help="that calibrate")
    args = parser.parse_args()
    print(environment("cpu"))
    tokenizer, dense = loaded()
    found = documentation_sentences(HELD_OUT + args.sentences)
    held_out = list(batches(tokenizer, found[:HELD_OUT]))
    calibration = list(batches(tokenizer, found[HELD_OUT:]))
    print(f"{len(found) - HELD_OUT} sentences calibrate, {HELD_OUT} are held out")
    rows = [
        {"keep": keep} | row
        for keep in args.keep
        for row in measured(dense, keep, calibration, held_out)
    ]
    print(tabulate(rows, headers="keys", floatfmt=".4g"))
    write_results("fidelity", rows, "cpu")


def measured(
    dense: nn.Module, keep: float, calibration: list[Any], held_out: list[Any]
) -> Iterator[dict[str, Any]]:
    expected = embedded(dense, held_out)
    ways: dict[str, dict[str, Any]] = {"svd": {}}
    ways |= {name: {"calibration": calibration} for name in ("fwsvd", "whitened", "planned")}
    ways["planned, told the embedding"] = {"calibration": calibration, "loss": embedding}
    for name, given in ways.items():
        model = copy.deepcopy(dense)
        start = time.perf_counter()
        method = name.partition(",")[0]
        report = fsc.compress_(model, keep=keep, include=LAYERS, method=method, **given)
        seconds = time.perf_counter() - start
        taken = [row for row in report.rows if row.reason != "not included"]
        share = sum(r.bytes_after for r in taken) / sum(r.bytes_before for r in taken)
        off = similarity_shift(embedded(model, held_out), expected)
        yield {"method": name, "share of parameters": share, "mean |Δcos|": off, "s": seconds}


@torch.no_grad()
def embedded(model: nn.Module, given: list[Any]) -> Tensor:
    return torch.cat([embed(model, batch) for batch in given])


if __name__ == "__main__":
    main()
