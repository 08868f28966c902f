"""The activation of a feed-forward, gated or not, as one pass over memory on Triton.

    hidden ← act(hidden)            or, gated,   hidden ← act(gate) · hidden

Computed in float32 and rounded once. Torch's own operators take two passes when gated, and round
in between.
"""

import triton
import triton.language as tl
from flashsvd_compile.kernels.activations_triton import activate
from torch import Tensor

# 8 elements a thread, 16 bytes of a 16-bit dtype: the widest load.
_BLOCK = 2048
_WARPS = 8


@triton.jit
def _activation_kernel(
    hidden, gate, size,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, SHORT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        y = activate(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION, SHORT)
        y = y * x
    else:
        y = activate(x, ACTIVATION, SHORT)
    tl.store(hidden + at, y.to(hidden.dtype.element_ty), mask=inside)


def activate_(hidden: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """``hidden`` overwritten and returned; ``gate`` of its shape. Both are contiguous."""
    size = hidden.numel()
    _activation_kernel[(triton.cdiv(size, _BLOCK),)](
        hidden, hidden if gate is None else gate, size,
        ACTIVATION=activation, GATED=gate is not None, SHORT=hidden.element_size() == 2,
        BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return hidden
