"""Compares the shared memory that planners foresee with what compiled kernels take.

    python -m bench.sram 200                    of every kernel
    python -m bench.sram 200 attention --generation sm_90 --seed 3

Random calls of each kernel (dtypes, ranks that fill their tiles and ranks that do not, masks,
gates, GPU generations), with tiles of its tables and their likes that registers hold. Kernels are
compiled ahead of time, so that no GPU is needed. A line of JSON for each goes to ``--out``.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.ahead import compiled, without_machine_code
from bench.sram_cases import CASES, Case, sampled


def measured(case: Case) -> dict[str, Any]:
    """Bytes foreseen and taken."""
    warnings.simplefilter("ignore")
    with without_machine_code():
        ((tile, kernel),) = compiled(case.module, case.generation, case.launch)
    if tile != case.tile:
        raise ValueError(f"the launcher took {tile} for {case}")
    return {"foreseen_bytes": case.foreseen_bytes(), "taken_bytes": kernel.metadata.shared}


def all_measured(cases: list[Case], jobs: int) -> Iterator[dict[str, Any]]:
    """In order, each as soon as it is there."""
    if jobs == 1:
        yield from map(measured, cases)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(measured, cases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, help="calls of each kernel")
    parser.add_argument("kernels", nargs="*", help=f"of {', '.join(CASES)}")
    parser.add_argument("--generation", help="only this one, as sm_90")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    for kernel in given.kernels or CASES:
        ratios: dict[str, list[float]] = {}
        cases = list(sampled(kernel, given.count, given.seed, given.generation))
        for case, bytes_ in zip(cases, all_measured(cases, given.jobs), strict=True):
            ratio = bytes_["foreseen_bytes"] / bytes_["taken_bytes"]
            ratios.setdefault(case.generation, []).append(ratio)
            if given.out is not None:
                with given.out.open("a") as out:
                    out.write(json.dumps({"kernel": kernel} | asdict(case) | bytes_) + "\n")
        for generation, found in sorted(ratios.items()):
            print(
                f"{kernel:18} {generation:7} {len(found):4}  min {min(found):.3f}  "
                f"median {statistics.median(found):.3f}  max {max(found):.3f}"
            )


if __name__ == "__main__":
    main()
