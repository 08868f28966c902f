"""The low-rank feed-forward in blocks of rows on library GEMMs, for ranks too large for a tile.

    for each block of rows:   h = act(P_u V_uᵀ + b_u)     [block_rows, F], one reused buffer
                              S[block] = h U_dᵀ + b_d     written straight into the output

Operands: ``feed_forward_operands.py``. Only [block_rows, F] exists of the intermediate, whatever
the number of rows, and where the last cache is large enough it stays there between the operators
that touch it. The first line is one kernel where that is faster (``lifted_activation.py``). Else it
is two matmuls, the gate's into a second buffer, and an activation in place; on a GPU
that is one pass that rounds once (``activation_pass.py``). Each operator rounds to the dtype, as
unfused. Ranks that a GPU's library GEMMs are slow at are padded. No autograd.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from flashsvd_compile.kernels.activations import ACTIVATIONS
from flashsvd_compile.kernels.devices import multiprocessors_of_device
from flashsvd_compile.kernels.feed_forward_operands import FeedForwardOperands
from flashsvd_compile.kernels.tiles import TileConfig
from torch import Tensor

# A matmul wants rows, memory does not. Xeon with AVX-512, 2 threads, torch 2.13.0, float32,
# 2026-11-25, medians of 60 interleaved rounds against Inductor at 4096 rows: F 3072, ranks 128 and
# 240, 1.5 and 1.3 times as fast in blocks of 256 rows, 1.7 and 1.4 of 512, 1.8 and 1.5 of 1024;
# F 1536, rank 153, 0.97, 1.07 and 1.12.
#
# Those are two cases. An intermediate beyond 32 MiB is given back to the system at each call
# (glibc's largest mmap threshold) and its pages faulted in anew: there blocks win. Below, from two
# blocks on, both take the same time within what the placement of memory alone changes, 0.8 to 1.2
# of each other (`python -m bench.feed_forward --device cpu --shapes crossover`, also `blocks`), and
# bytes decide.
CPU_BLOCK_ROWS = 512
CPU_FASTEST_FROM_BLOCKS = 2

# A block's second GEMM writes [block_rows, R_d] only: enough rows for this many waves of
# GEMM_TILE × GEMM_TILE output tiles over the multiprocessors. On an H100 80GB HBM3 at rank 1024
# (4224 rows of 32768, F 11008, SiLU gate) that takes 1.07 times what the unfused expression takes
# under Inductor, for 14% of its bytes; blocks of 1024 rows 1.22 times, of 16384 rows 1.01 times.
# torch 2.11.0, bfloat16, 2026-11-26.
#
# Lifted at once, a block has no second buffer for a gate and is launched by fewer kernels. Same
# H100 and day, triton 3.6.0, how many times as fast as Inductor: SiLU gate of rank 384 (F 3072) at
# 16384 rows, blocks of 2112, 4224, 8448 and 16896 rows: 0.84, 1.05, 1.16, 1.20; GELU of rank 384 at
# 65536 rows: 0.80, 0.99, 1.14, 1.21, and 1.31 in one block; SiLU gate of rank 1024 (32768 rows,
# F 11008): 0.85, 0.96, 0.98, 0.99.
GEMM_TILE = 128
GPU_WAVES = 2
GPU_WAVES_AT_ONCE = 4

# Library GEMMs on a GPU want every extent to be a multiple of 16 bytes, and so does the kernel that
# lifts at once: on an H100 80GB HBM3 (torch 2.11.0, bfloat16, 2026-11-26) a GEMM of 2816 × 14336
# took 0.60 ms at rank 1490, 0.18 at 1496, and copying a factor 0.07. At 1024 rows that made no
# difference, from 2048 on it paid.
ALIGNED_BYTES = 16


@torch.no_grad()
def row_blocks_feed_forward(
    of: FeedForwardOperands,
    *,
    out: Tensor | None = None,
    block_rows: int | None = None,
    tile: TileConfig | None = None,
) -> Tensor:
    """S [T, R_d], block after block; ``block_rows`` defaults to `default_block_rows`.

    ``tile``: of the kernel that lifts and activates at once, where that can take the operands;
    without one, library matmuls lift.
    """
    rows, gate = of.rows, of.gate
    out = of.allocate_output(out)
    if block_rows is None:
        block_rows = default_block_rows(
            rank_down=of.rank_down,
            multiprocessors=multiprocessors_of_device(of.up.device, 0),
            at_once=tile is not None,
        )
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, is {block_rows}")

    up_factor, up_rows = _aligned(of.up, of.up_factor, block_rows)
    gate_factor, gate_rows = None, None
    if gate is not None and of.gate_factor is not None:
        gate_factor, gate_rows = _aligned(gate, of.gate_factor, block_rows)
    rank_down = padded_rank(of.rank_down, of.up.element_size(), of.up.is_cuda)
    down_factor, down_bias = _padded(of.down_factor, 0, rank_down), of.down_bias
    if down_bias is not None:
        down_bias = _padded(down_bias, 0, rank_down)

    buffer_rows = min(block_rows, rows)
    up_buffer = of.up.new_empty(buffer_rows, of.intermediate_size)
    factors = [factor for factor in (up_factor, gate_factor) if factor is not None]
    lift_at_once = None if tile is None else _lift_at_once(of, factors, tile)
    has_gate_buffer = gate is not None and lift_at_once is None
    gate_buffer = torch.empty_like(up_buffer) if has_gate_buffer else None
    is_padded = down_factor is not of.down_factor
    latent_buffer = of.up.new_empty(buffer_rows, rank_down) if is_padded else None
    for start in range(0, rows, block_rows):
        stop = min(start + block_rows, rows)
        hidden = up_buffer[: stop - start]
        up_block = up_rows(start, stop)
        gate_block = None if gate_rows is None else gate_rows(start, stop)
        lifts = (up_block, up_factor, of.up_bias, gate_block, gate_factor, of.gate_bias)
        if lift_at_once is not None:
            lift_at_once(hidden, *lifts, of.activation)
        else:
            gated = None if gate_buffer is None else gate_buffer[: stop - start]
            _lift_then_activate(hidden, gated, *lifts, of.activation)
        if latent_buffer is None:
            _linear_into(out[start:stop], hidden, down_factor, down_bias)
        else:
            latent = latent_buffer[: stop - start]
            _linear_into(latent, hidden, down_factor, down_bias)
            out[start:stop] = latent[:, : of.rank_down]
    return out


def one_block_feed_forward(of: FeedForwardOperands, tile: TileConfig) -> Tensor:
    """What `row_blocks_feed_forward` is in one block, for operands that `are_lifted_at_once`: its
    two steps write nothing in place, so that a compiler may have them as nodes of its graph."""
    from flashsvd_compile.kernels.lifted_activation import lift_and_activate

    up, gate = (of.up, of.up_factor, of.up_bias), (of.gate, of.gate_factor, of.gate_bias)
    hidden = of.up.new_empty(of.rows, of.intermediate_size)
    lift_and_activate(hidden, *up, *gate, of.activation, tile=tile)
    return F.linear(hidden, of.down_factor, of.down_bias)


def are_lifted_at_once(of: FeedForwardOperands) -> bool:
    """Whether the kernel that lifts and activates takes all of them, on a GPU, and no rank is
    padded."""
    factors = [factor for factor in (of.up_factor, of.gate_factor) if factor is not None]
    ranks = (*(factor.shape[1] for factor in factors), of.rank_down)
    is_padded = any(rank != padded_rank(rank, of.up.element_size(), True) for rank in ranks)
    return not is_padded and _takes(of, factors)


def held_elements(
    *,
    lift_ranks: Sequence[int],
    rank_down: int,
    width: int,
    element_bytes: int,
    on_gpu: bool,
    at_once: bool,
) -> tuple[int, int]:
    """What is held beside operands and output: elements for each row of a block, and for all, a
    bias of the output included."""
    padded = {rank: padded_rank(rank, element_bytes, on_gpu) for rank in (*lift_ranks, rank_down)}
    copied = [padded[rank] for rank in (*lift_ranks, rank_down) if padded[rank] != rank]
    bias = padded[rank_down] if padded[rank_down] != rank_down else 0
    buffers = 1 if at_once else len(lift_ranks)
    return buffers * width + sum(copied), sum(copied) * width + bias


def padded_rank(rank: int, element_bytes: int, on_gpu: bool) -> int:
    """What a rank is padded to, in copies of factors and of a block of latents."""
    multiple = ALIGNED_BYTES // element_bytes if on_gpu else 1
    return -(-rank // multiple) * multiple


def default_block_rows(*, rank_down: int, multiprocessors: int, at_once: bool = False) -> int:
    """Rows of a block: as few as keep the GEMMs fast; ``at_once``: where one kernel lifts.

    ``multiprocessors`` of the GPU; 0 on a CPU.
    """
    if multiprocessors:
        column_tiles = max(1, -(-rank_down // GEMM_TILE))
        waves = GPU_WAVES_AT_ONCE if at_once else GPU_WAVES
        return GEMM_TILE * -(-waves * multiprocessors // column_tiles)
    return CPU_BLOCK_ROWS


def _linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _aligned(
    latent: Tensor, factor: Tensor, block_rows: int
) -> tuple[Tensor, Callable[[int, int], Tensor]]:
    """The factor, its rank padded, and what gives rows of the latent that fit it."""
    rank = padded_rank(latent.shape[1], latent.element_size(), latent.is_cuda)
    padded = _padded(factor, 1, rank)
    if padded is factor:
        return factor, lambda start, stop: latent[start:stop]
    buffer = latent.new_zeros(min(block_rows, latent.shape[0]), rank)

    def rows(start: int, stop: int) -> Tensor:
        buffer[: stop - start, : latent.shape[1]] = latent[start:stop]
        return buffer[: stop - start]

    return padded, rows


def _padded(x: Tensor, dim: int, extent: int) -> Tensor:
    """``x``, or a copy with zeros up to ``extent`` along ``dim``."""
    if x.shape[dim] == extent:
        return x
    shape = list(x.shape)
    shape[dim] = extent
    padded = x.new_zeros(shape)
    padded.narrow(dim, 0, x.shape[dim]).copy_(x)
    return padded


def _lift_at_once(
    of: FeedForwardOperands, factors: Sequence[Tensor], tile: TileConfig
) -> Callable[..., Tensor] | None:
    """The kernel that does, if it takes the latents and ``factors``; blocks of latents whose rank
    was padded it takes."""
    from flashsvd_compile.kernels.lifted_activation import lift_and_activate

    return partial(lift_and_activate, tile=tile) if _takes(of, factors) else None


def _takes(of: FeedForwardOperands, factors: Sequence[Tensor]) -> bool:
    """Whether the kernel that lifts and activates takes ``factors`` and the rest of ``of``: it is
    one for 16 bits."""
    from flashsvd_compile.kernels.primitives import is_describable

    if of.up.element_size() != 2:
        return False
    latents = [
        latent
        for latent, factor in zip((of.up, of.gate), factors, strict=False)
        if latent is not None and latent.shape[1] == factor.shape[1]
    ]
    biases = [x for x in (of.up_bias, of.gate_bias) if x is not None]
    are_rows_aligned = all(map(is_describable, (*latents, *factors)))
    return are_rows_aligned and all(bias.is_contiguous() for bias in biases)


def _lift_then_activate(
    hidden: Tensor,
    gated: Tensor | None,
    up: Tensor,
    up_factor: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_factor: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
) -> None:
    """h into ``hidden``, by way of ``gated``, a buffer of its shape."""
    _linear_into(hidden, up, up_factor, up_bias)
    if gate is not None and gate_factor is not None and gated is not None:
        _linear_into(gated, gate, gate_factor, gate_bias)
    _activate_in_place(hidden, gated, activation)


def _activate_in_place(hidden: Tensor, gate: Tensor | None, activation: str) -> None:
    if hidden.is_cuda and hidden.element_size() <= 4:  # the pass computes in float32
        from flashsvd_compile.kernels.activation_pass import activate_

        activate_(hidden, gate, activation)
    elif gate is None:
        ACTIVATIONS[activation].in_place(hidden)
    else:
        hidden.mul_(ACTIVATIONS[activation].in_place(gate))
