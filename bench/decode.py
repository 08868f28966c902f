"""A step of decoding at fixed ranks, ours beside every way to run it without us.

    python -m bench.decode [--case 1:0.6] [--case 16:0.6:4096] [--layers 8] [--profile]

Layers of Llama-2-7B's shape with random weights in bfloat16, all seven projections of a layer as
two factors at SVD-LLM's ranks (keep · mn / (m + n)); a case names batch, share of parameters and
tokens in a StaticCache (512). One token of each sequence is read against all others. Compiled ones
run as CUDA graphs (``mode="reduce-overhead"``). Interleaved medians, host and device, after the
gate: ours may err against a float64 run of the same low-rank model by no more than 1.1 times what
eager errs. The floor is what weights and cache take at the rate of a copy. ``--profile`` prints
what a step of the compiled ones spends its time in. On a CPU two narrow layers in float32.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaModel, StaticCache

from bench.contest import compare
from bench.encoder import replaced_linears
from bench.measure import environment, write_results
from bench.targets import Target
from flashsvd_compile.compress.modules import LowRankLinear

GATE = 1.1  # times eager's own error
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    "cpu": {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4},
}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
CASES = {"cuda": ["1:0.6", "1:0.4", "16:0.6", "1:0.6:4096"], "cpu": ["1:0.6:64"]}
LAYERS = {"cuda": 32, "cpu": 2}
COMPILED: dict[str, dict[str, Any]] = {
    "cuda": {"mode": "reduce-overhead", "dynamic": False},
    "cpu": {"dynamic": False},
}


@dataclass(frozen=True)
class Case:
    batch: int
    keep: float
    context: int = 512

    @classmethod
    def parse(cls, text: str) -> "Case":
        """BATCH:KEEP[:CONTEXT]"""
        try:
            batch, keep, *context = text.split(":")
            return cls(int(batch), float(keep), *map(int, context))
        except (TypeError, ValueError):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not BATCH:KEEP[:CONTEXT], as 1:0.6 and 16:0.6:4096 are"
            ) from None

    @property
    def targets(self) -> list[Target]:
        """On a GPU: what fewer bytes and fewer launches have to gain."""
        low_rank = 2.0 if self.batch > 1 else 1.7 if self.keep > 0.5 else 1.9
        dense = 1.8 if self.keep > 0.5 else 2.4
        return [
            Target("ours", ("low-rank Inductor",), low_rank),
            Target("ours", ("dense Inductor",), dense),
            Target("ours", ("low-rank eager",), 5.0),
        ]


@torch.no_grad()
def main() -> None:
    args = parse_args()
    print(environment(args.device))
    rows = []
    for case in args.case:
        rows.append(measure(case, args))
        path = write_results(args.name, rows, args.device)  # each at once: a case takes a minute
    print(path)
    if not all(row["gate"] for row in rows):
        raise SystemExit("the correctness gate is red: the times above mean nothing")


# ---- models and steps ---------------------------------------------------------------------------


def llama(device: str, layers: int, context: int) -> nn.Module:
    config = LlamaConfig(
        **SIZES[device], num_hidden_layers=layers, vocab_size=1000,
        max_position_embeddings=max(context, 64),
    )  # fmt: skip
    with torch.device(device):
        return LlamaModel(config).eval()


def factored(model: nn.Module, keep: float) -> nn.Module:
    """Each projection at SVD-LLM's rank, random factors whose product is as large as the matrix."""

    def low_rank(_: str, linear: nn.Linear) -> nn.Module:
        n, m = linear.in_features, linear.out_features
        with torch.device(linear.weight.device):
            return LowRankLinear(n, m, int(keep * m * n / (m + n)), bias=False)

    return replaced_linears(model, low_rank).eval()


def step_of(
    run: Callable, model: Any, case: Case, token: Tensor, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """One token after ``context - 1`` others; each call writes it where the last one did."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=case.context)
    head_dim = config.hidden_size // config.num_attention_heads
    shape = (case.batch, config.num_key_value_heads, case.context, head_dim)
    generator = torch.Generator(token.device).manual_seed(0)
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        k, v = (
            torch.randn(shape, device=token.device, generator=generator).to(dtype) for _ in "kv"
        )
        layer.lazy_initialization(k, v)
        layer.keys.copy_(k)
        layer.values.copy_(v)
        layer.cumulative_length.fill_(case.context - 1)
    lengths = [layer.cumulative_length for layer in layers]

    def step() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what was returned before is not read again
        out = run(token, past_key_values=cache).last_hidden_state
        torch._foreach_sub_(lengths, 1)
        return out

    return step


# ---- one case -----------------------------------------------------------------------------------


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    torch._dynamo.reset()
    device, dtype, how = args.device, DTYPES[args.device], COMPILED[args.device]
    dense = llama(device, args.layers, case.context)
    low_rank = factored(copy.deepcopy(dense), case.keep)
    exact = copy.deepcopy(low_rank).double()
    dense.to(dtype)
    low_rank.to(dtype)
    token = torch.randint(0, 1000, (case.batch, 1), device=device)
    exactly = step_of(exact, exact, case, token, torch.float64)()
    del exact
    models: dict[str, tuple[Callable, nn.Module]] = {
        "dense eager": (dense, dense),
        "dense Inductor": (torch.compile(dense, backend="inductor", **how), dense),
        "low-rank eager": (low_rank, low_rank),
        "low-rank Inductor": (torch.compile(low_rank, backend="inductor", **how), low_rank),
        "ours": (torch.compile(low_rank, backend="flashsvd", **how), low_rank),
    }
    calls = {name: step_of(run, model, case, token, dtype) for name, (run, model) in models.items()}
    errors = {
        name: float((call().double() - exactly).norm() / exactly.norm())
        for name, call in calls.items()
        if not name.startswith("dense")
    }
    found = compare(case, calls, device, errors=errors, targets=case.targets)
    if device == "cuda":
        found |= shares_of_the_floor(found["ms"], dense, low_rank, case, dtype)
    if args.profile:
        print_profiles({n: call for n, call in calls.items() if "eager" not in n}, device)
    gate = errors["ours"] <= GATE * errors["low-rank eager"]
    return asdict(case) | {"layers": args.layers} | found | {"gate": gate}


def shares_of_the_floor(
    ms: dict[str, float], dense: nn.Module, low_rank: nn.Module, case: Case, dtype: torch.dtype
) -> dict[str, Any]:
    """Of what weights of layers and the cache take at the rate of a copy, and a table of it."""
    from bench.floors import measured_rates

    rate = measured_rates(dtype).memory_bytes
    config: Any = low_rank.config
    cached = 2 * case.batch * case.context * config.hidden_size * config.num_hidden_layers
    floors = {
        name: (sum(p.nbytes for p in model.get_submodule("layers").parameters())
               + cached * dtype.itemsize) / rate * 1e3
        for name, model in (("dense", dense), ("low-rank", low_rank))
    }  # fmt: skip
    shares = {
        name: floors["dense" if name.startswith("dense") else "low-rank"] / taken
        for name, taken in ms.items()
    }
    print(tabulate([(name, f"{share:.2f}") for name, share in shares.items()],
                   headers=("", "share of a copy's rate"), disable_numparse=True))  # fmt: skip
    return {"floor_ms": floors, "share_of_copy": shares}


def print_profiles(calls: dict[str, Callable[[], Tensor]], device: str) -> None:
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    for name, call in calls.items():
        with profile(activities=kinds) as seen:
            call()
        spent = seen.key_averages().table(
            sort_by=f"self_{device}_time_total", row_limit=30, max_name_column_width=70
        )
        print(f"\n{name}\n{spent}", flush=True)


def parse_args() -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--case",
        action="append",
        type=Case.parse,
        help="BATCH:KEEP[:CONTEXT], may be given repeatedly",
    )
    parser.add_argument("--layers", type=int)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--name", default=f"decode_{device}", help="of the file in bench/results/")
    args = parser.parse_args()
    args.case = args.case or [Case.parse(text) for text in CASES[args.device]]
    args.layers = args.layers or LAYERS[args.device]
    return args


if __name__ == "__main__":
    main()
