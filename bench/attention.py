"""Rank-space attention: the kernel, or the library route, beside what torch does unaided.

    python -m bench.attention --device cuda
    python -m bench.attention --device cuda --tiles
    python -m bench.attention --device cpu

Each shape is timed in one run, contestants interleaved, from latents to the lifted output (the
lifts of q and of the output are included); before that every low-rank contestant must be as close
to float64 as the lifted eager expression is. `dense sdpa` attends at full width on tensors that
are there already; it computes another function and passes no gate. On CUDA each contestant is
replayed from a graph, so that the device is timed and not the host. Bytes are the peak of one
call, its output included. ``--tiles`` times every candidate tile instead. Results go to
``bench/results``.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from flashsvd_compile.kernels.attention_library import rank_space_attention_library
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.attention_reference import lifted_attention
from flashsvd_compile.kernels.attention_tiles import AttentionExtents, candidate_tiles
from torch import Tensor

from bench.measure import captured, median_ms, peak_transient_bytes, write_results

GATE_BATCH = 1


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    rows: int
    head_dim: int
    rank: int
    is_causal: bool = False
    padded: bool = False
    dtype: str = "bfloat16"


SHAPES = {
    "cuda": [
        Shape(32, 12, 512, 64, 32),
        Shape(32, 12, 512, 64, 32, padded=True),
        Shape(32, 12, 512, 64, 40),
        Shape(32, 12, 512, 64, 40, padded=True),
        Shape(32, 12, 512, 64, 64),
        Shape(8, 12, 2048, 64, 32),
        Shape(2, 32, 4096, 128, 64),
        Shape(2, 32, 4096, 128, 64, is_causal=True),
    ],
    "cpu": [
        Shape(8, 12, 256, head_dim, rank, dtype="float32")
        for head_dim in (32, 64)
        for rank in (16, 32, 40, 64)
    ],
}


def operands(shape: Shape, device: str) -> tuple[tuple[Tensor, ...], dict]:
    torch.manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    heads, width, rank = shape.heads, shape.head_dim, shape.rank

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device=device) * scale).to(dtype)

    latents = tuple(normal(shape.batch, shape.rows, heads, rank).transpose(1, 2) for _ in "qkv")
    keywords = {
        **{f"{name}_factor": normal(heads, width, rank, scale=rank**-0.5) for name in "qkv"},
        **{f"{name}_bias": normal(heads, width) for name in "qv"},
        "num_heads": heads,
        "scale": width**-0.5,
        "is_causal": shape.is_causal,
    }
    if shape.padded:
        lengths = torch.randint(shape.rows // 2, shape.rows + 1, (shape.batch, 1), device=device)
        keywords["mask"] = (torch.arange(shape.rows, device=device) < lengths)[:, None, None]
    return latents, keywords


def contestants(shape: Shape, device: str) -> dict[str, Callable[[], Tensor]]:
    latents, keywords = operands(shape, device)
    of = AttentionOperands(*latents, **keywords)
    calls: dict[str, Callable[[], Tensor]] = {
        "lifted inductor": partial(torch.compile(lifted, dynamic=False), *latents, **keywords),
        "lifted eager": partial(lifted, *latents, **keywords),
        "dense sdpa": _dense(shape, device, keywords.get("mask")),
        "library": partial(rank_space_attention_library, of),
    }

    if device == "cuda":
        from flashsvd_compile.kernels.attention import rank_space_attention

        kernel = {"kernel": partial(rank_space_attention, of)}
        calls = {**kernel, **calls}
    return calls


def lifted(*latents: Tensor, **keywords: Any) -> Tensor:
    return lifted_attention(AttentionOperands(*latents, **keywords))


def _dense(shape: Shape, device: str, mask: Tensor | None) -> Callable[[], Tensor]:
    size = (shape.batch, shape.rows, shape.heads, shape.head_dim)
    q, k, v = (
        torch.randn(size, device=device).to(getattr(torch, shape.dtype)).transpose(1, 2)
        for _ in "qkv"
    )
    attend = F.scaled_dot_product_attention
    return partial(attend, q, k, v, attn_mask=mask, is_causal=shape.is_causal)


def check(shape: Shape, device: str, calls: dict[str, Callable[[], Tensor]]) -> None:
    """Raise unless each low-rank contestant is as close to float64 as lifted eager is."""
    latents, keywords = operands(shape, device)
    few = {
        name: x.double() if isinstance(x, Tensor) and x.dtype != torch.bool else x
        for name, x in keywords.items()
    }
    if "mask" in few:
        few["mask"] = few["mask"][:GATE_BATCH]
    exact = lifted(*(x[:GATE_BATCH].double() for x in latents), **few)
    eager_error = (calls["lifted eager"]()[:GATE_BATCH] - exact).norm()
    budget = 1.1 * eager_error + 2 * torch.finfo(latents[0].dtype).eps * exact.norm()
    for name, call in calls.items():
        if name == "dense sdpa":
            continue
        error = (call()[:GATE_BATCH] - exact).norm()
        if not error <= budget:
            raise AssertionError(f"{shape} {name}: error {error:.3e} over {budget:.3e}")


def measure_shape(shape: Shape, device: str, rounds: int) -> dict:
    torch._dynamo.reset()
    calls = contestants(shape, device)
    check(shape, device, calls)
    peaks = {name: peak_transient_bytes(call, device) for name, call in calls.items()}
    timed = calls if device == "cpu" else {name: captured(call) for name, call in calls.items()}
    times = median_ms(timed, device, rounds=rounds)
    for name in calls:
        print(f"  {name:16} {times[name]:8.4f} ms {peaks[name] / 2**20:8.1f} MiB", flush=True)
    return asdict(shape) | {"ms": times, "peak_bytes": peaks}


def measure_tiles(shape: Shape, rounds: int) -> dict:
    from flashsvd_compile.kernels.attention import rank_space_attention

    latents, keywords = operands(shape, "cuda")
    of = AttentionOperands(*latents, **keywords)
    properties = torch.cuda.get_device_properties("cuda")
    extents = AttentionExtents(
        head_dim_qk=shape.head_dim,
        head_dim_v=shape.head_dim,
        rank_q=shape.rank,
        rank_k=shape.rank,
        rank_v=shape.rank,
        q_lifted=True,
        v_lifted=True,
        element_bytes=2,
        has_warpgroups=properties.major == 9,
    )
    sram_bytes = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    calls = {
        f"{t.block_m}x{t.block_n} warps {t.num_warps} stages {t.num_stages}": captured(
            partial(rank_space_attention, of, tile=t)
        )
        for t in candidate_tiles(extents, sram_bytes)
    }
    times = median_ms(calls, "cuda", rounds=rounds)
    for name, time in sorted(times.items(), key=lambda item: item[1]):
        print(f"  {name:28} {time:8.4f} ms", flush=True)
    return asdict(shape) | {"ms": times}


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank-space attention against torch's own.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device)
    parser.add_argument("--tiles", action="store_true", help="time every candidate tile")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    rows = []
    for shape in SHAPES[arguments.device]:
        print(shape, flush=True)
        if arguments.tiles:
            rows.append(measure_tiles(shape, arguments.rounds))
        else:
            rows.append(measure_shape(shape, arguments.device, arguments.rounds))
    name = "attention_tiles" if arguments.tiles else f"attention_{arguments.device}"
    print(write_results(name, rows, arguments.device))


if __name__ == "__main__":
    main()
