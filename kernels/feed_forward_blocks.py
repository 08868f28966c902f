"""The low-rank feed-forward in blocks of rows on library GEMMs, for ranks too large for a tile.

    for each block of rows:   h = act(P_u V_uᵀ + b_u)     [block_rows, F], one reused buffer
                              S[block] = h U_dᵀ + b_d     written straight into the output

Operands: ``feed_forward_operands.py``. Only [block_rows, F] exists of the intermediate
(twice when gated), whatever the number of rows, and where the last cache is large enough it stays
there between the three operators that touch it. Each operator rounds to the dtype, as unfused. No
autograd.
"""

import torch
from flashsvd_compile.kernels.activations import ACTIVATIONS
from flashsvd_compile.kernels.feed_forward_operands import FeedForwardOperands
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
# GEMM_TILE × GEMM_TILE output tiles over the multiprocessors. On an H100 at rank 1024 (4224 rows of
# 32768, F 11008, SiLU gate) that costs 5% over unfused eager, for an eighth of its bytes; torch
# 2.11.0, 2026-11-25, `python -m bench.feed_forward --device cuda`.
GEMM_TILE = 128
GPU_WAVES = 2


@torch.no_grad()
def row_blocks_feed_forward(
    of: FeedForwardOperands,
    *,
    out: Tensor | None = None,
    block_rows: int | None = None,
) -> Tensor:
    """S [T, R_d], block after block; ``block_rows`` defaults to `default_block_rows`."""
    rows, gate = of.rows, of.gate
    out = of.allocate_output(out)
    if block_rows is None:
        block_rows = default_block_rows(rank_down=of.rank_down, device=of.up.device)
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, is {block_rows}")

    activate_in_place = ACTIVATIONS[of.activation].in_place
    buffer_rows = min(block_rows, rows)
    up_buffer = of.up.new_empty(buffer_rows, of.intermediate_size)
    gate_buffer = torch.empty_like(up_buffer) if gate is not None else None
    for start in range(0, rows, block_rows):
        stop = min(start + block_rows, rows)
        hidden = up_buffer[: stop - start]
        _linear_into(hidden, of.up[start:stop], of.up_factor, of.up_bias)
        if gate is None or of.gate_factor is None or gate_buffer is None:
            activate_in_place(hidden)
        else:
            gated = gate_buffer[: stop - start]
            _linear_into(gated, gate[start:stop], of.gate_factor, of.gate_bias)
            hidden.mul_(activate_in_place(gated))
        _linear_into(out[start:stop], hidden, of.down_factor, of.down_bias)
    return out


def default_block_rows(*, rank_down: int, device: torch.device) -> int:
    """Rows of a block: as few as keep the GEMMs fast."""
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        column_tiles = max(1, -(-rank_down // GEMM_TILE))
        return GEMM_TILE * -(-GPU_WAVES * multiprocessors // column_tiles)
    return CPU_BLOCK_ROWS


def _linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
