"""Rank-space attention: the kernel, or the library route, beside what torch does unaided.

    python -m bench.attention --device cuda
    python -m bench.attention --device cpu

Each shape is timed in one run, contestants interleaved, from latents to the lifted output (the
lifts of q and of the output are included); before that every low-rank contestant must be as close
to float64 as the lifted eager expression is. The dense contestants attend at full width on tensors
that are there already, each on the one backend of SDPA that it names; they compute another
function and pass no gate. Results go to ``bench/results``.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from flashsvd_compile.kernels.attention_library import rank_space_attention_library
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.attention_reference import lifted_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.contest import contest
from bench.measure import write_results
from bench.targets import Target
from bench.work import Work

DENSE = {
    "cuda": {
        "dense cuDNN": SDPBackend.CUDNN_ATTENTION,
        "dense FlashAttention": SDPBackend.FLASH_ATTENTION,
    },
    "cpu": {"dense FlashAttention": SDPBackend.FLASH_ATTENTION},
}

GATE_HEADS = 2  # the scores of two heads of 16384 queries are 4 GiB of float64


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    rows: int
    head_dim: int
    ranks: tuple[int, int, int]  # of q, k and v
    is_causal: bool = False
    padded: bool = False  # ragged lengths, each at least half of the rows
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Row:
    """A shape, and how many times as fast as each baseline the kernel has to be there."""

    shape: Shape
    over_lifted: float | None = None
    over_dense: float | None = None

    @property
    def targets(self) -> list[Target]:
        asked = [
            (("lifted Inductor",), self.over_lifted),
            (tuple(DENSE["cuda"]), self.over_dense),
        ]
        return [Target("kernel", names, ratio) for names, ratio in asked if ratio is not None]


_LLAMA = Shape(2, 32, 4096, 128, (64, 64, 64))

ROWS = {
    "cuda": [
        Row(Shape(32, 12, 512, 64, (32, 32, 32)), 5, 1.3),
        Row(Shape(32, 12, 512, 64, (32, 32, 32), padded=True)),
        Row(Shape(32, 12, 512, 64, (40, 40, 40)), 4, 1.05),
        Row(Shape(32, 12, 512, 64, (40, 40, 40), padded=True)),
        Row(Shape(32, 12, 512, 64, (64, 64, 64)), 4, 0.9),
        Row(Shape(8, 12, 2048, 64, (32, 32, 32)), 3.5, 1.6),
        Row(_LLAMA, 3.5, 1.5),
        Row(replace(_LLAMA, is_causal=True), 3.5, 1.4),
        Row(replace(_LLAMA, batch=1, rows=16384, is_causal=True), 2.5, 1.4),
        Row(Shape(32, 12, 512, 64, (48, 24, 40), padded=True), 4, 1.2),
    ],
    "cpu": [
        Row(Shape(8, 12, 256, head_dim, (rank, rank, rank), dtype="float32"))
        for head_dim in (32, 64)
        for rank in (16, 32, 40, 64)
    ],
}


def operands(shape: Shape, device: str) -> tuple[tuple[Tensor, ...], dict]:
    """Latents and the other operands, fresh ones at each call."""
    dtype = getattr(torch, shape.dtype)
    heads, width = shape.heads, shape.head_dim

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device=device) * scale).to(dtype)

    ranks = dict(zip("qkv", shape.ranks, strict=True))
    latents = tuple(
        normal(shape.batch, shape.rows, heads, rank).transpose(1, 2) for rank in shape.ranks
    )
    keywords = {
        **{f"{x}_factor": normal(heads, width, r, scale=r**-0.5) for x, r in ranks.items()},
        **{f"{name}_bias": normal(heads, width) for name in "qv"},
        "num_heads": heads,
        "scale": width**-0.5,
        "is_causal": shape.is_causal,
    }
    if shape.padded:
        lengths = torch.randint(shape.rows // 2, shape.rows + 1, (shape.batch, 1), device=device)
        keywords["mask"] = (torch.arange(shape.rows, device=device) < lengths)[:, None, None]
    return latents, keywords


def work_of(of: AttentionOperands, visible_keys: float) -> Work:
    """The least work of a call whose queries of one head see ``visible_keys`` keys in all."""
    shape = of.shape
    pairs = shape.num_heads * visible_keys
    queries = shape.batch * shape.num_heads * shape.queries
    lifts = shape.head_dim_qk * (shape.rank_q + shape.rank_k) + shape.head_dim_v * shape.rank_v
    read = (of.q, of.k, of.v, of.q_factor, of.k_factor, of.v_factor, of.q_bias, of.v_bias, of.mask)
    written = queries * shape.head_dim_v * of.q.element_size()
    return Work(
        matmul_flops=2 * pairs * (shape.rank_k + shape.rank_v) + 2 * queries * lifts,
        memory_bytes=written + sum(x.nbytes for x in read if x is not None),
        exponentials=pairs,
    )


def visible_keys(shape: Shape, mask: Tensor | None) -> float:
    """Over all batch elements, how many (query, key) pairs of one head are not masked."""
    if mask is not None:
        if shape.is_causal:
            mask = mask & torch.ones(shape.rows, shape.rows, device=mask.device).tril().bool()
        return float(mask.expand(-1, -1, shape.rows, -1).sum())
    seen = shape.rows * (shape.rows + 1) / 2 if shape.is_causal else shape.rows**2
    return shape.batch * seen


def contestants(
    shape: Shape, device: str, latents: tuple[Tensor, ...], keywords: dict
) -> dict[str, Callable[[], Tensor]]:
    of = AttentionOperands(*latents, **keywords)
    calls: dict[str, Callable[[], Tensor]] = {
        "lifted Inductor": partial(torch.compile(lifted, dynamic=False), *latents, **keywords),
        "lifted eager": partial(lifted, *latents, **keywords),
        "library": partial(rank_space_attention_library, of),
        **dense(shape, device, keywords.get("mask")),
    }
    if device == "cuda":
        from flashsvd_compile.kernels.attention import rank_space_attention

        calls = {"kernel": partial(rank_space_attention, of), **calls}
    return calls


def lifted(*latents: Tensor, **keywords: Any) -> Tensor:
    return lifted_attention(AttentionOperands(*latents, **keywords))


def dense(shape: Shape, device: str, mask: Tensor | None) -> dict[str, Callable[[], Tensor]]:
    """SDPA at full width, on each backend that takes the shape and its mask."""
    size = (shape.batch, shape.rows, shape.heads, shape.head_dim)
    q, k, v = (
        torch.randn(size, device=device).to(getattr(torch, shape.dtype)).transpose(1, 2)
        for _ in "qkv"
    )

    def attend(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):  # that one or an error: none stands in for another
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=shape.is_causal
            )

    calls: dict[str, Callable[[], Tensor]] = {}
    for name, backend in DENSE[device].items():
        try:
            attend(backend)
        except RuntimeError as error:
            print(f"  {name} does not take it: {str(error).splitlines()[0]}", flush=True)
        else:
            calls[name] = partial(attend, backend)
    return calls


def check(
    calls: dict[str, Callable[[], Tensor]], latents: tuple[Tensor, ...], keywords: dict
) -> None:
    """Raise unless each low-rank contestant is as close to float64 as lifted eager is."""
    few = {
        name: (x[:1] if name == "mask" else x[:GATE_HEADS]) if isinstance(x, Tensor) else x
        for name, x in keywords.items()
    } | {"num_heads": GATE_HEADS}
    doubled = {
        name: x.double() if isinstance(x, Tensor) and x.dtype != torch.bool else x
        for name, x in few.items()
    }
    exact = lifted(*(x[:1, :GATE_HEADS].double() for x in latents), **doubled)

    def error(name: str) -> float:
        return float((calls[name]()[:1, :GATE_HEADS] - exact).norm())

    rounding = 2 * torch.finfo(latents[0].dtype).eps * float(exact.norm())
    budget = 1.1 * error("lifted eager") + rounding
    for name in calls:
        if name.startswith("dense"):
            continue
        found = error(name)
        if not found <= budget:
            raise AssertionError(f"{name}: error {found:.3e} over {budget:.3e}")


def measure_row(row: Row, device: str, rounds: int) -> dict:
    torch._dynamo.reset()
    shape = row.shape
    latents, keywords = operands(shape, device)
    calls = contestants(shape, device, latents, keywords)
    check(calls, latents, keywords)
    of = AttentionOperands(*latents, **keywords)
    measured = contest(
        calls,
        device,
        dtype=latents[0].dtype,
        work=work_of(of, visible_keys(shape, of.mask)),
        targets=row.targets,
        rounds=rounds,
    )
    return asdict(shape) | measured


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank-space attention against torch's own.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    measured = []
    for row in ROWS[arguments.device]:
        print(f"\n{row.shape}", flush=True)
        measured.append(measure_row(row, arguments.device, arguments.rounds))
    print(write_results(f"attention_{arguments.device}", measured, arguments.device))


if __name__ == "__main__":
    main()
