"""Memory budgets: whether they are kept, at what cost in time, and how well peaks are predicted.

    python -m bench.memory              budgets of BERT, then predictions over a grid of models

Budgets: 12-layer BERT-base shape, 40 ranks a head and 240 elsewhere, batch 32, length 512, under
budgets of 128, 96 and 64 MiB of transient bytes, against the same model without one. The grid:
encoders and decoders of a few layers and several shapes, each without pressure, under shares of
what it held so, and under the least that it is told to need; ``peak`` is the allocator's, outputs
included, as it is predicted. A budget that cannot be kept has to be refused.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

import flashsvd_compile as fsc
from bench.encoder import Case, factored, image_size, inputs_of, vit
from bench.measure import environment, median_ms, peak_transient_bytes, write_results
from bench.parallel import in_processes
from flashsvd_compile.memory.measured import measured_peak
from flashsvd_compile.planner.budget import BudgetError

MIB = 2**20

# MiB, and how many times the unbudgeted time it may take.
BUDGETS = {128: 1.05, 96: 1.15, 64: 1.35}


def bert(layers: int, length: int) -> nn.Module:
    config = BertConfig(num_hidden_layers=layers, max_position_embeddings=length)
    return factored(BertModel(config, add_pooling_layer=False))


def decoder(kind: str, length: int, device: str) -> nn.Module:
    """Two layers of random factors; what they hold does not depend on the numbers."""
    if kind == "gpt2":
        config: Any = GPT2Config(n_layer=2, vocab_size=1000, n_positions=length, use_cache=False,
                                 bos_token_id=0, eos_token_id=0)  # fmt: skip
        model: nn.Module = GPT2Model(config)
    else:
        config = LlamaConfig(
            hidden_size=768, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=12,
            num_key_value_heads=4, vocab_size=1000, use_cache=False,
        )  # fmt: skip
        model = LlamaModel(config)
    fsc.compress_(model.to(device), keep=0.4)
    return model.eval()


# Of what is held without pressure; None for the least that an error names.
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, None)
GRID: list[tuple[str, int, int]] = [
    *((kind, batch, length) for kind in ("bert", "llama", "gpt2")
      for batch, length in ((1, 1024), (4, 384), (16, 128), (3, 333), (32, 256))),
    ("vit", 8, 197),
    ("vit", 64, 197),
]  # fmt: skip


def case_of(kind: str, batch: int, length: int, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    if kind in ("bert", "vit"):
        model = bert(2, length) if kind == "bert" else factored(vit(length))
        if kind == "vit":
            assert image_size(length)
            model.layers = model.layers[:2]  # type: ignore[index]
        inputs = inputs_of(Case(kind, batch, length, "bfloat16"), device, dtype)
    else:
        model = decoder(kind, length, device)
        inputs = {"input_ids": torch.randint(0, 1000, (batch, length), device=device)}
    return model.to(device=device, dtype=dtype), inputs


def compiled(model: nn.Module, inputs: Any, budget: str | int) -> Callable[[], Tensor]:
    torch._dynamo.reset()
    run = torch.compile(model, backend="flashsvd", options={"memory_budget": budget})
    return lambda: run(**inputs)[0]


def predicted_bytes(model: nn.Module, inputs: Any, budget: str | int) -> int:
    found = fsc.explain(model, **inputs, options={"memory_budget": budget})
    return max(peak.total_bytes for peak in found.peaks)


@torch.no_grad()
def budgets(device: str) -> Iterator[dict[str, Any]]:
    model = bert(12, 512).to(device=device, dtype=torch.bfloat16)
    inputs = inputs_of(Case("bert", 32, 512, "bfloat16"), device, torch.bfloat16)
    runs = {"none": torch.compile(model, backend="flashsvd")}
    expected = {"none": model(**inputs)[0].float()}
    for budget in BUDGETS:
        torch._dynamo.reset()
        runs[str(budget)] = torch.compile(
            model, backend="flashsvd", options={"memory_budget": f"{budget}MiB"}
        )
    out_bytes = expected["none"].numel() * 2
    calls: dict[str, Callable[[], Tensor]] = {
        name: lambda run=run: run(**inputs)[0]  # type: ignore[misc]
        for name, run in runs.items()
    }
    peaks = {name: peak_transient_bytes(call, device) - out_bytes for name, call in calls.items()}
    times = median_ms(calls, device, rounds=30)
    for name, call in calls.items():
        error = float((call().float() - expected["none"]).norm() / expected["none"].norm())
        row = {"budget_mib": name, "ms": times[name], "ratio": times[name] / times["none"],
               "transient_mib": peaks[name] / MIB, "difference": error}  # fmt: skip
        if name != "none":
            kept = peaks[name] <= int(name) * MIB
            row["verdict"] = kept and row["ratio"] <= BUDGETS[int(name)] and error < 0.02
        yield row


@torch.no_grad()
def grid_of(case: tuple[str, int, int], device: str) -> list[dict[str, Any]]:
    """One model under every budget."""
    torch._dynamo.config.automatic_dynamic_shapes = False
    kind, batch, length = case
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, inputs = case_of(kind, batch, length, device, dtype)
    rows: list[dict[str, Any]] = []
    free = least = 0
    for share in ("free", *SHARES):
        if share is None and not least:
            continue
        budget: int | str = least if share is None else "1000GiB"
        if isinstance(share, float):
            budget = int(free * share)
        row = {"model": kind, "batch": batch, "length": length, "share": share or "least"}
        try:
            predicted_bytes(model, inputs, budget)
        except BudgetError as error:
            least = error.least_bytes
            rows.append(row | {"outcome": "refused"})
            continue
        call = compiled(model, inputs, budget)
        call()
        # Compiling has measured what this device reaches: plans of before may have been others.
        predicted = predicted_bytes(model, inputs, budget)
        measured = measured_peak(call, device)
        peak, transient = measured.total_bytes, measured.transient_bytes
        free = free or transient
        is_kept = isinstance(budget, str) or transient <= budget
        rows.append(row | {
            "peak_mib": peak / MIB, "predicted_mib": predicted / MIB, "off": predicted / peak,
            "transient_mib": transient / MIB, "outcome": "kept" if is_kept else "BROKEN",
        })  # fmt: skip
    return rows


def grid(device: str) -> Iterator[dict[str, Any]]:
    jobs = min(len(GRID), os.cpu_count() or 1) if device == "cuda" else 1
    for rows in in_processes(partial(grid_of, device=device), GRID, jobs):
        yield from rows


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--only", choices=("budgets", "grid"))
    args = parser.parse_args()
    torch._dynamo.config.automatic_dynamic_shapes = False
    print(environment(args.device))
    rows: list[dict[str, Any]] = []
    tables = {"grid": grid(args.device)}
    if args.device == "cuda":
        tables = {"budgets": budgets(args.device)} | tables
    for name, table in tables.items():
        if args.only not in (None, name):
            continue
        start = len(rows)
        for row in table:
            rows.append(row)
            print(row, flush=True)
            write_results(f"memory_{args.device}", rows, args.device)
        print(f"\n{tabulate(rows[start:], headers='keys')}\n", flush=True)


if __name__ == "__main__":
    main()
