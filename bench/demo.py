"""Sentence embeddings in rank space: a real model compressed, compiled, timed, and compared.

    python -m bench.demo

Factors all-MiniLM-L6-v2 to half of its encoder's parameters in two ways, calibrated by the same
sentences of Python's own documentation: "whitened", every matrix to one share, and "planned", by
what each rank is worth to the output. Shows what the compiler does with each site of the second,
and embeds other sentences with

- the dense model, eager and under Inductor;
- the whitened and the planned one under Inductor ("unfused": full-width activations);
- the planned one under ``torch.compile(backend="flashsvd")``.

In bfloat16 on a GPU where there is one, else in float32 on the CPU. Two things move embeddings:
what was cut off, and how what is left is run; the table tells them apart.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import flashsvd_compile as fsc
from bench.measure import environment, median_ms, peak_transient_bytes
from bench.sentences import batches, documentation_sentences, embed, loaded, similarity_shift

MAX_TOKENS = 256  # where the model's card truncates


@torch.no_grad()
def main() -> None:
    args = parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    print(", ".join(f"{name} {value}" for name, value in environment(args.device).items()))

    progress("loading all-MiniLM-L6-v2")
    tokenizer, dense = loaded()
    found = documentation_sentences(args.sentences + args.calibration)
    calibration = list(batches(tokenizer, found[args.sentences :]))
    inputs = tokenizer(
        found[: args.sentences], padding=True, truncation=True, max_length=MAX_TOKENS,
        return_tensors="pt",
    ).to(args.device)  # fmt: skip
    rows, length = inputs["input_ids"].shape
    print(f"{rows} sentences, padded to {length} tokens, {dtype} on {args.device}")
    models = {"dense": dense}
    for method in ("whitened", "planned"):
        progress(f"factoring a copy: keep={args.keep}, {method!r}")
        models[method] = copy.deepcopy(dense)
        with torch.enable_grad():
            report = fsc.compress_(
                models[method], keep=args.keep, method=method, calibration=calibration
            )
        print(f"{method}: {str(report).splitlines()[-1]}")
    for model in models.values():
        model.to(args.device, dtype)

    if args.backend == "flashsvd":
        progress("explaining")
        print(f"\n{fsc.explain(models['planned'], **inputs)}\n")
    ways = [
        ("dense", "eager"), ("dense", "inductor"), ("whitened", "inductor"),
        ("planned", "inductor"), ("planned", args.backend),
    ]  # fmt: skip
    print(compare(models, ways, inputs, args.device))


def compare(
    models: dict[str, nn.Module], ways: list[tuple[str, str]], inputs: dict[str, Tensor],
    device: str,
) -> str:  # fmt: skip
    """The table: bytes, time, memory and errors of each way to run a model: (model, backend)."""
    of = {f"{name}, {backend}": models[name] for name, backend in ways}
    runs: dict[str, Callable[..., Any]] = {}
    for (_, backend), (way, model) in zip(ways, of.items(), strict=True):
        is_eager = backend == "eager"
        runs[way] = model if is_eager else torch.compile(model, backend=backend)
    eager = {model: embed(model, inputs) for model in models.values()}
    embeddings = {}
    for way, run in runs.items():
        progress(f"embedding: {way}")
        embeddings[way] = embed(run, inputs)
    calls = {way: lambda run=run: run(**inputs) for way, run in runs.items()}
    progress("measuring memory")
    peaks = {way: peak_transient_bytes(call, device) for way, call in calls.items()}
    progress("measuring time")
    times = median_ms(calls, device, warmup=1, rounds=20 if device == "cuda" else 5)

    table = []
    for way, model in of.items():
        parameters = sum(p.numel() * p.element_size() for p in model.parameters())
        error = (embeddings[way] - eager[model]).norm() / eager[model].norm()
        table.append(
            (
                way,
                f"{similarity_shift(embeddings[way], eager[models['dense']]):.5f}",
                f"{parameters / 2**20:.1f}",
                f"{times[way]:.2f}",
                f"{peaks[way] / 2**20:.1f}",
                f"{error:.1e}",
            )
        )
    headers = (
        "model, backend",
        "mean |Δcos|\nagainst dense",
        "MiB of\nparameters",
        "median ms",
        "peak MiB of\nactivations",
        "error against\nitself in eager",
    )
    return tabulate(table, headers, disable_numparse=True, colalign=("left", *["right"] * 5))


def progress(step: str) -> None:
    print(f"... {step}", file=sys.stderr, flush=True)


def parse_args() -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="flashsvd", help="torch.compile's backend for ours")
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--keep", type=float, default=0.5, help="share of parameters to keep")
    parser.add_argument(
        "--sentences", type=int, default=1024 if device == "cuda" else 64, help="batch size"
    )
    parser.add_argument("--calibration", type=int, default=256, help="sentences to factor by")
    return parser.parse_args()


if __name__ == "__main__":
    main()
