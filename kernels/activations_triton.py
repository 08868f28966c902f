"""The activations of ``activations.py`` for a float32 tile on chip.

`activate(x, ACTIVATION, SHORT)` is branch-free, propagates NaN, and is finite wherever torch's is.

The Gaussian GELU's erf costs some 25 instructions an element and bounds a streamed feed-forward at
small ranks. Where the result is rounded to 16 bits (``SHORT``), a shorter form is taken:

    x Φ(x) = max(x, 0) − z Φ(−z),   z = |x|,   Φ(−z) = 2^p(z)

with p of degree 6, fitted in the minimax sense to log₂ Φ(−z) on [0, 6]; one exponential, no
division, no cancellation. Its relative error against x Φ(x) stays below 2⁻¹⁴ wherever
|x Φ(x)| ≥ 2⁻²⁴ (float16's rounding: 2⁻¹¹, bfloat16's: 2⁻⁸, float16's least step: 2⁻²⁴) and its
absolute error below 2⁻²⁷ elsewhere; z stops at 6, where z Φ(−z) is 6e-9. A test holds both bounds.
"""

import triton
import triton.language as tl

# A constant stands right of the tile in a product: Triton's interpreter asks for that order.
_SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_TWO_SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(1.5957691216057308)
_CUBIC: tl.constexpr = tl.constexpr(0.044715)
_QUICK_SLOPE: tl.constexpr = tl.constexpr(1.702)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, SHORT: tl.constexpr):
    """``ACTIVATION`` of a float32 tile; ``SHORT`` where the result is rounded to 16 bits."""
    if ACTIVATION == "gelu":
        y = _gelu_short(x) if SHORT else 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        # ½ (1 + tanh u) is sigmoid(2u): nothing cancels for negative x.
        y = x * _sigmoid(x * _TWO_SQRT_2_OVER_PI * (x * x * _CUBIC + 1.0))
    elif ACTIVATION == "quick_gelu":
        y = x * _sigmoid(x * _QUICK_SLOPE)
    elif ACTIVATION == "relu":
        y = _relu(x)
    elif ACTIVATION == "relu_squared":
        y = _relu(x) * _relu(x)
    elif ACTIVATION == "silu":
        y = x * _sigmoid(x)
    elif ACTIVATION == "sigmoid":
        y = _sigmoid(x)
    elif ACTIVATION == "tanh":
        y = _tanh(x)
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
        y = x
    return y


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _sigmoid(x):
    # exp2 reaches inf for very negative x, and 1 / inf is the 0 wanted.
    return 1.0 / (1.0 + tl.exp2(x * -_LOG2_E))


@triton.jit
def _tanh(x):
    # Near 0, 2 sigmoid(2x) - 1 cancels; there an odd polynomial (Cephes' tanhf) is exact to an ulp.
    s = x * x
    p = -5.70498872745e-3 * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    return tl.where(s < 0.390625, p * s * x + x, 2.0 * _sigmoid(2.0 * x) - 1.0)


@triton.jit
def _gelu_short(x):
    z = tl.minimum(tl.abs(x), 6.0)
    p = 2.4679378839209676e-05 * z - 0.0006382490391843021
    p = p * z + 0.007357868831604719
    p = p * z - 0.051628388464450836
    p = p * z - 0.46073099970817566
    p = p * z - 1.150413155555725
    p = p * z - 1.0000478029251099
    return _relu(x) - z * tl.exp2(p)
