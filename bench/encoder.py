"""A whole encoder: BERT-base's shape at fixed ranks, ours beside every way to run it without us.

    python -m bench.encoder [--shape 32x512] [--shape 8x2048]

12 layers, rank 40 a head for q, k and v, rank 240 elsewhere, a padding mask with ragged lengths,
bfloat16 on a GPU (float32 on a CPU). Interleaved medians, after the gate: ours may err against a
float64 run of the same low-rank model by no more than 1.1 times what eager errs.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from bench.measure import environment, median_ms, peak_transient_bytes, write_results
from flashsvd_compile.compress.modules import LowRankLinear, PerHeadLowRankLinear

HEAD_RANK = 40
RANK = 240
GATE = 1.1  # times eager's own error


@torch.no_grad()
def main() -> None:
    args = parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=args.layers, max_position_embeddings=4096)
    dense: nn.Module = BertModel(config, add_pooling_layer=False).eval().to(args.device)
    low_rank = factored(copy.deepcopy(dense))
    exact = copy.deepcopy(low_rank).double()
    dense.to(dtype)
    low_rank.to(dtype)
    print(environment(args.device))
    rows = []
    for shape in args.shape:
        batch, length = map(int, shape.split("x"))
        rows += measure(dense, low_rank, exact, ragged_inputs(batch, length, args.device), shape)
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    print(write_results(args.name, rows, args.device))
    if not all(row["gate"] for row in rows):
        raise SystemExit("the correctness gate is red: the times above mean nothing")


def factored(model: Any) -> nn.Module:
    """Replace every linear of the encoder: q, k, v per head at HEAD_RANK, the others at RANK."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    for path, module in list(model.encoder.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        parent, _, name = path.rpartition(".")
        low_rank: nn.Module
        if name in ("query", "key", "value"):
            low_rank = PerHeadLowRankLinear(
                module.in_features, config.num_attention_heads, head_dim, HEAD_RANK,
                device=module.weight.device,
            )  # fmt: skip
        else:
            low_rank = LowRankLinear(
                module.in_features, module.out_features, RANK, device=module.weight.device
            )
        setattr(model.encoder.get_submodule(parent), name, low_rank)
    return model.eval()


def ragged_inputs(batch: int, length: int, device: str) -> dict[str, Tensor]:
    """Random tokens; each row is padded after a length of its own, at least half."""
    ids = torch.randint(0, 30000, (batch, length), device=device)
    lengths = torch.randint(length // 2, length + 1, (batch, 1), device=device)
    lengths[0] = length
    mask = (torch.arange(length, device=device) < lengths).long()
    return {"input_ids": ids, "attention_mask": mask}


def measure(
    dense: nn.Module, low_rank: nn.Module, exact: nn.Module, inputs: dict[str, Tensor], shape: str
) -> list[dict[str, object]]:
    device = inputs["input_ids"].device
    runs: dict[str, Callable] = {
        "dense eager": dense,
        "dense Inductor": torch.compile(dense, backend="inductor"),
        "low-rank eager": low_rank,
        "low-rank Inductor": torch.compile(low_rank, backend="inductor"),
        "ours": torch.compile(low_rank, backend="flashsvd"),
    }
    calls = {name: lambda run=run: run(**inputs)[0] for name, run in runs.items()}
    kept = inputs["attention_mask"].bool()
    reference = torch.cat([  # float64 activations of the whole batch need not fit
        exact(**{k: v[i : i + 1] for k, v in inputs.items()})[0].float() for i in range(len(kept))
    ])[kept]  # fmt: skip
    errors = {
        name: float((calls[name]()[kept].float() - reference).norm() / reference.norm())
        for name in ("low-rank eager", "low-rank Inductor", "ours")
    }
    peaks = {name: peak_transient_bytes(call, device) for name, call in calls.items()}
    rounds = {"warmup": 3, "rounds": 30} if device.type == "cuda" else {"warmup": 1, "rounds": 5}
    times = median_ms(calls, device, **rounds)
    gate = errors["ours"] <= GATE * errors["low-rank eager"]
    return [
        {
            "shape": shape,
            "model": name,
            "median_ms": times[name],
            "speedup_of_ours": times[name] / times["ours"],
            "peak_mib": peaks[name] / 2**20,
            "error": errors.get(name),
            "gate": gate,
        }
        for name in runs
    ]


def parse_args() -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", help="BATCHxLENGTH, may be given repeatedly")
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--name", default="encoder", help="of the file in bench/results/")
    args = parser.parse_args()
    args.shape = args.shape or ["32x512", "8x2048"]
    return args


if __name__ == "__main__":
    main()
