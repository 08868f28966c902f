"""What every Triton kernel here shares: the matmul whose rounding is the same everywhere."""

import triton
import triton.language as tl

# Triton's interpreter computes ``tl.dot`` of bfloat16 wrongly (seen in 3.9), so interpreted
# kernels multiply in float32. Fixed at import, as is Triton's own choice to interpret.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """``acc + a @ b`` accumulated in float32; ``acc`` may be None.

    ``PRECISION`` is ``"ieee"`` or ``"tf32"`` and matters for float32 operands alone.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=tl.float32)
