"""What a convolution of 16-bit floats on a GPU holds beside its operands and its result.

cuDNN's tensor cores read channels last, and as many channels as 16 bytes hold or a multiple. It
copies the input and the weight so; where Inductor has laid both out with the channels last before,
that is another copy, else the result is copied back.

Seen at ViT-B/16's patches, 3 channels of 16 × 16 (H100 80GB HBM3, torch 2.11.0, bfloat16,
2026-11-27): 9.125 MiB of workspace at batch 8, which are the input and the weight of 8 channels,
beside Inductor's copies of 2.3 and 1.1 MiB; and 174.9 MiB in all at batch 128 in a graph that
Inductor leaves as it is, which are 98 and 3 MiB and the result twice.
"""

import sympy
from torch import fx

from flashsvd_compile.analysis.axes import Size, shape_of
from flashsvd_compile.analysis.calls import arguments, aten, packet, value

_CONVOLUTIONS = {aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution}

# Bytes that the channels of a pixel have to be a multiple of.
ALIGNED_BYTES = 16


def convolution_scratch_bytes(node: fx.Node) -> Size:
    """0 where ``node`` is no convolution, or one that was not measured."""
    if packet(node) not in _CONVOLUTIONS or value(node).dtype.itemsize != 2:
        return sympy.S.Zero
    named = arguments(node)
    if value(node).device.type == "cpu" or named["groups"] != 1:
        return sympy.S.Zero
    read = [shape_of(value(named[name])) for name in ("input", "weight")]
    multiple = ALIGNED_BYTES // 2
    channels = read[0][1]
    padded = multiple * sympy.ceiling(channels / multiple)
    copied = sympy.Add(*(sympy.Mul(*shape) for shape in read))
    if padded == channels:
        return copied * 2
    result = sympy.Mul(*shape_of(value(node)))
    return (copied / channels * padded + sympy.Max(copied, result)) * 2
