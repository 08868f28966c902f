"""Memory budgets: whether they are kept, at what cost in time, and how well peaks are predicted.

    python -m bench.memory              budgets of BERT, then predictions over a grid of models

Budgets: 12-layer BERT-base shape, 40 ranks a head and 240 elsewhere, batch 32, length 512, under
budgets of 128, 96 and 64 MiB of transient bytes, against the same model without one. The grid:
encoders and decoders of a few layers and several shapes, each without pressure and then under half
of what it held so; ``peak`` is the allocator's, outputs included, as it is predicted.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

import flashsvd_compile as fsc
from bench.encoder import Case, factored, image_size, inputs_of, vit
from bench.measure import environment, median_ms, peak_transient_bytes, write_results
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


GRID: list[tuple[str, int, int]] = [
    *((kind, batch, length) for kind in ("bert", "llama", "gpt2")
      for batch, length in ((1, 1024), (4, 384), (16, 128), (3, 333))),
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
def grid(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for kind, batch, length in GRID:
        model, inputs = case_of(kind, batch, length, device, dtype)
        budget: int | str = "1000GiB"
        for _ in range(2):
            row = {"model": kind, "batch": batch, "length": length, "budget": budget}
            try:
                call = compiled(model, inputs, budget)
                out_bytes = call().nbytes
                peak = peak_transient_bytes(call, device)
            except Exception as error:  # Dynamo wraps what a backend raises
                if BudgetError.__name__ not in str(error):
                    raise
                yield row | {"outcome": "BudgetError"}
                break
            predicted = predicted_bytes(model, inputs, budget)
            transient = peak - out_bytes
            kept = isinstance(budget, str) or transient <= budget
            yield row | {"peak_mib": peak / MIB, "predicted_mib": predicted / MIB,
                         "off": predicted / peak, "transient_mib": transient / MIB,
                         "outcome": "kept" if kept else "BROKEN"}  # fmt: skip
            budget = int(transient * 0.5)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    args = parser.parse_args()
    torch._dynamo.config.automatic_dynamic_shapes = False
    print(environment(args.device))
    rows: list[dict[str, Any]] = []
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    tables = [budgets(args.device)] if args.device == "cuda" else []
    for table in (*tables, grid(args.device, dtype)):
        start = len(rows)
        for row in table:
            rows.append(row)
            print(row, flush=True)
        print(f"\n{tabulate(rows[start:], headers='keys')}\n", flush=True)
        write_results(f"memory_{args.device}", rows, args.device)


if __name__ == "__main__":
    main()
