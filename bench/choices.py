"""Whether the planner picks the fastest lowering: every legal one of many sites, timed.

    python -m bench.choices --device cuda
    python -m bench.choices --device cpu

A case is a module with one site. It is compiled once with each lowering that the site can have,
all under Inductor, and timed in turns; beside it stands which one the planner picks by itself, and
how much longer that takes than the best. A lowering that is off from the unfused module by more
than roundings is no contestant but an error. On CUDA calls are replayed from CUDA graphs, several
processes compile at a time, and one of them at a time has the device. Asked: 5% in the median and
15% at worst. Results go to ``bench/results``.
"""

import argparse
import math
import os
import random
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import flashsvd_compile as fsc
from bench.measure import captured, environment, median_ms, write_results
from bench.parallel import in_processes, my_turn
from flashsvd_compile.compress.modules import LowRankLinear, PerHeadLowRankLinear
from flashsvd_compile.options import (
    ATTENTION_LOWERINGS,
    CHAIN_LOWERINGS,
    FEED_FORWARD_LOWERINGS,
    SIBLINGS_LOWERINGS,
)
from flashsvd_compile.report import SiteReport

MEDIAN_LOSS, WORST_LOSS = 0.05, 0.15
LOWERINGS = {
    "attention": ATTENTION_LOWERINGS,
    "feed_forward": FEED_FORWARD_LOWERINGS,
    "chain": CHAIN_LOWERINGS,
    "siblings": SIBLINGS_LOWERINGS,
}


@dataclass(frozen=True)
class Case:
    """``rows`` of ``batch`` sequences; ``width``: of the intermediate axis, or of a chain's end."""

    kind: str
    batch: int
    rows: int
    hidden: int
    rank: int
    width: int = 0
    heads: int = 0
    gated: bool = False
    is_causal: bool = False
    dtype: str = "bfloat16"


class Attention(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, head_dim = case, case.hidden // case.heads
        self.qkv = nn.ModuleList(
            PerHeadLowRankLinear(case.hidden, case.heads, head_dim, case.rank) for _ in "qkv"
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.case.heads
        q, k, v = (p(x).unflatten(-1, (heads, -1)).transpose(1, 2) for p in self.qkv)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.case.is_causal)
        return mixed.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.up = LowRankLinear(case.hidden, case.width, case.rank)
        self.gate = LowRankLinear(case.hidden, case.width, case.rank) if case.gated else None
        self.down = LowRankLinear(case.width, case.hidden, case.rank)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(F.gelu(up) if self.gate is None else F.silu(self.gate(x)) * up)


class Siblings(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            LowRankLinear(case.hidden, case.width, case.rank) for _ in range(3)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(member(x) for member in self.members)


MODULES: dict[str, Callable[[Case], nn.Module]] = {
    "attention": Attention,
    "feed_forward": FeedForward,
    "chain": lambda case: LowRankLinear(case.hidden, case.width, case.rank),
    "siblings": Siblings,
}


# How often each kind comes.
KINDS = {
    "cuda": {"feed_forward": 4, "attention": 3, "chain": 1, "siblings": 1},
    "cpu": {"feed_forward": 1, "attention": 1},
}


def cases(device: str, seed: int, count: int, only: str | None = None) -> list[Case]:
    """Random sites of shapes that encoders and decoders have; ``only`` of one kind."""
    rng = random.Random(seed)
    found: list[Case] = []
    kinds = KINDS[device] if only is None else {only: 1}
    while len(found) < count:
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        case = _case(kind, rng, device)
        if case not in found:
            found.append(case)
    return found


def _case(kind: str, rng: random.Random, device: str) -> Case:
    on_gpu = device == "cuda"
    tokens = rng.choice((256, 1024, 4096, 16384, 65536) if on_gpu else (64, 256, 1024, 4096))
    hidden = rng.choice((384, 768, 1024, 2048, 4096) if on_gpu else (384, 768))
    dtype = "bfloat16" if on_gpu and rng.random() < 0.9 else "float32"
    if kind == "attention":
        length = min(tokens, rng.choice((128, 197, 512, 2048, 4096)))
        head_dim = rng.choice((64, 64, 128))
        heads = min(hidden, 2048) // head_dim
        rank = rng.choice((16, 24, 32, 40, 48, 64, 96))
        return Case(
            kind, min(32, max(1, tokens // length)), length, heads * head_dim, min(rank, head_dim),
            heads=heads, is_causal=rng.random() < 0.4, dtype=dtype,
        )  # fmt: skip
    if kind == "feed_forward":
        width = hidden * rng.choice((2, 4) if hidden < 4096 else (2, 3))
        share = rng.choice((0.06, 0.12, 0.2, 0.3))
        rank = max(16, int(hidden * share) // 8 * 8)
        return Case(kind, 1, tokens, hidden, rank, width, gated=rng.random() < 0.5, dtype=dtype)
    rank = max(16, int(hidden * rng.choice((0.06, 0.12, 0.25, 0.4))) // 8 * 8)
    if kind == "siblings":
        tokens = rng.choice((1, 8, 64, 512, 4096))
    return Case(kind, 1, tokens, hidden, rank, hidden * rng.choice((1, 2)), dtype=dtype)


def options_of(case: Case, lowering: str) -> dict[str, Any]:
    """Only the site of the case's own kind may change."""
    return {kind: lowering if kind == case.kind else "unfused" for kind in LOWERINGS}


@torch.no_grad()
def contest(case: Case, device: str) -> dict[str, Any]:
    """Milliseconds of every lowering that the site can have, and the planner's pick."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    module = MODULES[case.kind](case).to(device=device, dtype=dtype).eval()
    x = torch.randn(case.batch, case.rows, case.hidden, device=device, dtype=dtype)
    runs: dict[str, Callable[[], Any]] = {}
    plans: dict[str, Any] = {}
    expected = _flat(module(x))
    for lowering in LOWERINGS[case.kind]:
        if lowering == "auto":
            continue
        options = options_of(case, lowering)
        site = _site(case, module, x, options)
        if (site.lowering if site else "unfused") != lowering:
            continue
        if site and site.plan:
            plans[lowering] = {"tile": site.plan.tile, "block_rows": site.plan.block_rows,
                               "predicted_ms": (site.plan.seconds or math.nan) * 1e3}  # fmt: skip
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="flashsvd", options=options)
        error = (_flat(compiled(x)) - expected).norm() / expected.norm()
        assert error < (2e-2 if dtype == torch.bfloat16 else 2e-3), (case, lowering, error)
        runs[lowering] = lambda compiled=compiled: compiled(x)  # type: ignore[misc]
    site = _site(case, module, x, options_of(case, "auto"))
    picked = site.lowering if site and site.lowering else "unfused"
    with my_turn():
        if device == "cuda":
            runs = {name: captured(call) for name, call in runs.items()}
        ms = median_ms(runs, device, rounds=15)
    best = min(ms, key=lambda name: ms[name])
    return {**asdict(case), "ms": ms, "plans": plans, "picked": picked, "best": best,
            "loss": ms[picked] / ms[best] - 1}  # fmt: skip


def _flat(result: Any) -> Tensor:
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([part.float().flatten() for part in parts])


def _site(case: Case, module: nn.Module, x: Tensor, options: dict[str, Any]) -> SiteReport | None:
    """The site of the case's kind, None where none is found."""
    sites = fsc.explain(module, x, options=options).sites
    return next((site for site in sites if site.kind == case.kind and site.lowering), None)


def main() -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=default, choices=("cpu", "cuda"))
    parser.add_argument("--count", type=int, default=72)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--only", choices=tuple(LOWERINGS), help="one kind of site")
    given = parser.parse_args()
    jobs = given.jobs or (min(14, os.cpu_count() or 1) if given.device == "cuda" else 1)
    print(environment(given.device))
    rows: list[dict[str, Any]] = []
    every = cases(given.device, given.seed, given.count, given.only)
    for row in in_processes(partial(contest, device=given.device), every, jobs):
        rows.append(row)
        print(row, flush=True)
        write_results(f"choices_{given.device}", rows, given.device)
    told = [
        {k: v for k, v in row.items() if k != "plans"}
        | {"ms": " ".join(f"{k} {v:.4f}" for k, v in row["ms"].items())}
        for row in rows
    ]
    print(f"\n{tabulate(told, headers='keys', floatfmt='.3f')}\n")
    losses = [row["loss"] for row in rows]
    median, worst = statistics.median(losses), max(losses)
    passed = median <= MEDIAN_LOSS and worst <= WORST_LOSS
    print(f"median loss {median:.1%}, worst {worst:.1%}: {'pass' if passed else 'FAIL'}")


if __name__ == "__main__":
    main()
