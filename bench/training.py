"""A step of training at fixed ranks: forward and backward, ours beside eager and Inductor.

    python -m bench.training [--case 32x512:0.0] [--case 32x512:0.1] [--profile]

BERT-base's shape, 12 layers, about half of the dense parameters (rank 32 a head for q, k and v, 192
for the attention's output, 304 for the feed-forward), bfloat16 on a GPU; a case names batch, length
and dropout of hidden states; attention has none. Interleaved medians of two runs, after the gate:
over all parameters, gradients may err against float64 by no more than 1.1 times what those of the
graph that was rewritten err, run by the same compiler: both by Inductor, both operator by operator
(Inductor itself errs more than eager, as it keeps other intermediates in 16 bits).
Peak bytes are those of activations, and of what gradients are before they are added: parameters
and their sums are there before. On a CPU two layers in float32. ``--profile`` prints what a step
of each spends its time in, and whose gradients are how far off.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertModel

from bench.contest import compare
from bench.encoder import Case as EncoderCase
from bench.encoder import inputs_of, replaced_linears
from bench.measure import environment, write_results
from bench.targets import Target
from flashsvd_compile.compress.modules import LowRankLinear, PerHeadLowRankLinear

HEAD_RANK = 32
RANKS = {"output": 192, "feed_forward": 304}
GATE = 1.1  # times the unfused graph's own error
UNCOMPILED = "ours, uncompiled"
SAME_COMPILER = {UNCOMPILED: "low-rank eager", "ours": "low-rank Inductor"}
TARGETS = [
    Target("ours", ("low-rank Inductor",), 1.0),
    Target("ours", ("low-rank eager",), 1.0, bytes_share=0.55),
]


@dataclass(frozen=True)
class Case:
    batch: int
    length: int
    dropout: float
    layers: int = 12

    @classmethod
    def parse(cls, text: str) -> "Case":
        """BATCHxLENGTH:DROPOUT"""
        try:
            sizes, dropout = text.split(":")
            batch, length = map(int, sizes.split("x"))
            return cls(batch, length, float(dropout))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not BATCHxLENGTH:DROPOUT, as 32x512:0.1 is"
            ) from None


def low_rank_bert(case: Case) -> nn.Module:
    config = BertConfig(
        max_position_embeddings=case.length, num_hidden_layers=case.layers,
        hidden_dropout_prob=case.dropout, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)

    def low_rank(name: str, linear: nn.Linear) -> nn.Module:
        if name in ("query", "key", "value"):
            heads = config.num_attention_heads
            head_dim = config.hidden_size // heads
            return PerHeadLowRankLinear(linear.in_features, heads, head_dim, HEAD_RANK)
        is_square = linear.in_features == linear.out_features
        rank = RANKS["output" if is_square else "feed_forward"]
        return LowRankLinear(linear.in_features, linear.out_features, rank)

    return replaced_linears(model, low_rank).train()


def step_of(forward: Callable[..., Any], inputs: dict[str, Tensor]) -> Callable[[], None]:
    """Forward and backward; gradients are added to those that are there."""

    def step() -> None:
        forward(**inputs)[0].float().square().mean().backward()

    return step


def gradients(model: nn.Module, step: Callable[[], None]) -> Tensor:
    """Of one step, all in a row."""
    for parameter in model.parameters():
        parameter.grad.zero_()  # type: ignore[union-attr]
    torch.manual_seed(0)
    step()
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])  # type: ignore


def print_profile(name: str, step: Callable[[], None], device: str) -> None:
    """The kernels of one step that take most of the device's time."""
    kind = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiled:
        step()
    order = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    table = profiled.key_averages().table(sort_by=order, row_limit=24, max_name_column_width=72)
    print(f"\n{name}\n{table}", flush=True)


def print_errors(model: nn.Module, off: Mapping[str, Tensor], truth: Tensor) -> None:
    """By parameter, the squared error of gradients as a share of all of the squared gradient."""
    shares: dict[str, list[float]] = {}
    start = 0
    for path, parameter in model.named_parameters():
        part = slice(start, start + parameter.numel())
        shares[path] = [float((x[part].norm() / truth.norm()) ** 2) for x in off.values()]
        start = part.stop
    worst = sorted(shares.items(), key=lambda item: -max(item[1]))[:24]
    rows = [(path, *(f"{x:.1e}" for x in found)) for path, found in worst]
    print(tabulate(rows, headers=["squared error of", *off], disable_numparse=True), flush=True)


def measure(case: Case, device: str, is_profiled: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = low_rank_bert(case).to(device)
    exact = copy.deepcopy(model).double()
    model.to(dtype)
    inputs = inputs_of(EncoderCase("bert", case.batch, case.length, "bfloat16"), device, dtype)
    for parameter in (*model.parameters(), *exact.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    runs: dict[str, Callable[..., Any]] = {
        "low-rank eager": model,
        "low-rank Inductor": torch.compile(model, backend="inductor"),
        "ours": torch.compile(model, backend="flashsvd"),
    }
    steps = {name: step_of(run, inputs) for name, run in runs.items()}
    errors, off = {}, {}
    if not case.dropout:  # else each draws its own
        few = {name: x[:1] for name, x in inputs.items()}  # float64 of the whole batch may not fit
        truth = gradients(exact, step_of(exact, few))
        uncompiled = torch.compile(model, backend="flashsvd", options={"compiler": "aot_eager"})
        for name, run in {**runs, UNCOMPILED: uncompiled}.items():
            off[name] = gradients(model, step_of(run, few)) - truth
            errors[name] = float(off[name].norm() / truth.norm())
        if is_profiled:
            print_errors(model, off, truth)
        torch._dynamo.reset()
    del exact, off
    found = compare(case, steps, device, errors=errors, targets=TARGETS)
    if is_profiled:
        for name, step in steps.items():
            print_profile(name, step, device)
    is_right = all(
        errors[ours] <= GATE * errors[unfused] for ours, unfused in SAME_COMPILER.items() if errors
    )
    if errors:
        print(f"  {UNCOMPILED} errs {errors[UNCOMPILED]:.2e}; gate {'kept' if is_right else 'RED'}")
    return asdict(case) | found | {"gate": is_right}


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", type=Case.parse, help="BATCHxLENGTH:DROPOUT")
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    texts = ["32x512:0.0", "32x512:0.1"] if args.device == "cuda" else ["2x64:0.0"]
    torch._dynamo.config.automatic_dynamic_shapes = False
    print(environment(args.device))
    rows = []
    for case in args.case or map(Case.parse, texts):
        layers = case.layers if args.device == "cuda" else 2
        rows.append(measure(replace(case, layers=layers), args.device, args.profile))
        path = write_results(f"training_{args.device}", rows, args.device)
    print(path)
    if not all(row["gate"] for row in rows):
        raise SystemExit("the correctness gate is red: the times above mean nothing")


if __name__ == "__main__":
    main()
