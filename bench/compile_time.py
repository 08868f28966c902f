"""Seconds to compile beside Inductor alone, and how the passes' own seconds grow with the graph.

    python -m bench.compile_time [--part bert] [--part llama] [--part growth] [--rounds 3]

`bert` is BERT-base's shape, 12 layers, rank 40 a head for q, k and v, rank 240 elsewhere; `llama`
has Llama's 32 layers, grouped keys and all, at widths of a toy, on which the time to compile does
not depend. Each is compiled by both backends in turns, each time in a process of its own with
empty caches, where a product of the same kinds has been compiled before: what loading the
compilers takes counts for neither. The time is that of the first call, Dynamo's part included;
the least of all rounds counts.

`growth` runs the passes alone, over graphs of up to 20,000 nodes (bench/deep_graph.py).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from transformers import LlamaConfig, LlamaModel

from bench.deep_graph import deep_graph
from bench.encoder import bert, factored, replaced_linears
from bench.measure import environment, write_results
from bench.targets import Verdict, print_verdicts
from flashsvd_compile.compress.modules import LowRankLinear
from flashsvd_compile.options import Options
from flashsvd_compile.pipeline import rewrite

BACKENDS = ("inductor", "flashsvd")
BATCH, LENGTH = 2, 128
LLAMA_LAYERS, LLAMA_HIDDEN, LLAMA_RANK = 32, 256, 32

# Times Inductor alone; and time a node at the largest size over that at the second.
ASKED_RATIO = 1.1
ASKED_GROWTH = 1.3
NODES = (1_000, 2_000, 5_000, 10_000, 20_000)

# On a CPU in float32, every site rewritten by force: the passes have most to do. On a GPU in
# bfloat16, of which tiles are known: where they are not, a first call waits for them to be timed.
OPTIONS = {"cpu": {"attention": "rank_space", "feed_forward": "row_blocks"}, "cuda": {}}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


@torch.no_grad()
def main() -> None:
    args = parse_args()
    if args.alone is not None:
        name, backend = args.alone
        print(json.dumps(compile_alone(name, backend, args.device)))
        return
    print(environment(args.device))
    rows = []
    for part in args.part:
        rows.append(growth(args) if part == "growth" else beside_inductor(part, args))
        path = write_results(args.name, rows, args.device)  # each at once: they take minutes
    print(path)


# ---- beside Inductor ----------------------------------------------------------------------------


def low_rank_bert(device: str) -> nn.Module:
    return factored(bert(LENGTH).to(device))


def low_rank_llama(device: str) -> nn.Module:
    config = LlamaConfig(
        hidden_size=LLAMA_HIDDEN, intermediate_size=3 * LLAMA_HIDDEN, num_attention_heads=8,
        num_key_value_heads=2, num_hidden_layers=LLAMA_LAYERS, vocab_size=1000, use_cache=False,
    )  # fmt: skip

    def low_rank(_: str, linear: nn.Linear) -> nn.Module:
        has_bias = linear.bias is not None
        return LowRankLinear(linear.in_features, linear.out_features, LLAMA_RANK, bias=has_bias)

    return replaced_linears(LlamaModel(config), low_rank).eval().to(device)


MODELS: dict[str, Callable[[str], nn.Module]] = {"bert": low_rank_bert, "llama": low_rank_llama}


def beside_inductor(name: str, args: argparse.Namespace) -> dict[str, Any]:
    rounds: dict[str, list[dict[str, Any]]] = {backend: [] for backend in BACKENDS}
    for _ in range(args.rounds):
        for backend in BACKENDS:
            rounds[backend].append(in_a_fresh_process(name, backend, args.device))
    best = {backend: min(runs, key=lambda run: run["seconds"]) for backend, runs in rounds.items()}
    ours, theirs = best["flashsvd"]["seconds"], best["inductor"]["seconds"]
    table = [
        (backend, *(f"{run[key]:.2f}" for key in ("seconds", "cpu_seconds", "passes")))
        for backend, run in best.items()
    ]
    headers = ("", "seconds", "CPU seconds", "of these the passes")
    print(f"\n{name}\n{tabulate(table, headers, disable_numparse=True)}", flush=True)
    verdict = Verdict("seconds of flashsvd over inductor", ours / theirs, "≤", ASKED_RATIO)
    return {
        "part": name,
        "best": best,
        "all_seconds": {b: [run["seconds"] for run in runs] for b, runs in rounds.items()},
        "verdicts": print_verdicts([verdict]),
    }


def in_a_fresh_process(name: str, backend: str, device: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "bench.compile_time", "--alone", name, backend,
             "--device", device],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache},
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def compile_alone(name: str, backend: str, device: str) -> dict[str, Any]:
    """Seconds of the first call of a model, and of each pass in it."""
    options: Any = OPTIONS[device] if backend == "flashsvd" else None
    there: Any = {"device": device, "dtype": DTYPES[device]}
    small = torch.compile(nn.Sequential(nn.Linear(64, 64), nn.GELU()).to(**there), backend=backend)
    small(torch.randn(64, 64, **there))
    model = torch.compile(MODELS[name](device).to(**there), backend=backend, options=options)
    inputs = {
        "input_ids": torch.randint(0, 1000, (BATCH, LENGTH), device=device),
        "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long, device=device),
    }
    inputs["attention_mask"][1, LENGTH // 2 :] = 0
    seconds_of = _passes_told()
    began, cpu_began = time.perf_counter(), _cpu_seconds()
    model(**inputs)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - began, _cpu_seconds() - cpu_began
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "passes": sum(seconds_of.values()),
        "seconds_of_pass": seconds_of,
    }


def _passes_told() -> dict[str, float]:
    """Filled with the seconds of each pass of all graphs that are compiled from now on."""
    from flashsvd_compile import backend

    seconds: dict[str, float] = {}

    def told(*args: Any, **kwargs: Any) -> Any:
        rewritten = rewrite(*args, **kwargs)
        for name, spent in rewritten.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + spent
        return rewritten

    backend.rewrite = told
    return seconds


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for: C++ compilers."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


# ---- growth -------------------------------------------------------------------------------------


def growth(args: argparse.Namespace) -> dict[str, Any]:
    """Time a node of each pass, on the CPU: no device is needed to rewrite a graph."""
    per_block = deep_graph(2).nodes - deep_graph(1).nodes
    passes_of(2)  # loads what the passes import, and fills caches
    sizes = []
    for nodes in NODES:
        runs = [passes_of(round(nodes / per_block)) for _ in range(args.rounds)]
        sizes.append(min(runs, key=lambda run: run["cpu_seconds"]))
        print(f"  {sizes[-1]['nodes']} nodes: {sizes[-1]['cpu_seconds']:.2f} s", flush=True)
    each = [size["cpu_seconds"] / size["nodes"] for size in sizes]
    passes = list(sizes[0]["seconds_of_pass"])
    table = [
        (size["nodes"], f"{size['cpu_seconds']:.2f}", f"{1e6 * per_node:.0f}",
         *(f"{1e6 * size['seconds_of_pass'][name] / size['nodes']:.0f}" for name in passes))
        for size, per_node in zip(sizes, each, strict=True)
    ]  # fmt: skip
    headers = ("nodes", "CPU seconds", "µs a node", *passes)
    print(f"\ngrowth\n{tabulate(table, headers, disable_numparse=True)}", flush=True)
    what = f"CPU time a node at {NODES[-1]} over that at {NODES[1]}"
    verdict = Verdict(what, each[-1] / each[1], "≤", ASKED_GROWTH)
    return {"part": "growth", "sizes": sizes, "verdicts": print_verdicts([verdict])}


def passes_of(blocks: int) -> dict[str, Any]:
    graph = deep_graph(blocks)
    began = time.process_time()
    rewritten = rewrite(graph.gm, graph.example_inputs, Options.parse(OPTIONS["cpu"]))
    return {
        "nodes": graph.nodes,
        "cpu_seconds": time.process_time() - began,
        "seconds_of_pass": rewritten.seconds,
    }


def parse_args() -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = [*MODELS, "growth"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=parts)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--name", default="compile_time", help="of the file in bench/results/")
    parser.add_argument("--alone", nargs=2, metavar=("MODEL", "BACKEND"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.part = args.part or parts
    return args


if __name__ == "__main__":
    main()
