"""The low-rank feed-forward from x to y on library operators, its middle plain or in blocks.

Operands: ``feed_forward_whole_operands.py``. Latents are in memory, and every operator rounds.
"""

from collections.abc import Callable

import torch.nn.functional as F
from flashsvd_compile.kernels.feed_forward_operands import FeedForwardOperands
from flashsvd_compile.kernels.feed_forward_reference import unfused_feed_forward
from flashsvd_compile.kernels.feed_forward_whole_operands import WholeFeedForwardOperands
from torch import Tensor


def unfused_whole_feed_forward(
    of: WholeFeedForwardOperands,
    middle: Callable[[FeedForwardOperands], Tensor] = unfused_feed_forward,
) -> Tensor:
    """y [T, OUT]; ``middle`` makes S of the latents. Differentiable if ``middle`` is."""
    up = F.linear(of.x, of.up_u, of.up_latent_bias)
    gate = None
    if of.gate_v is not None:
        gate = up
    if of.gate_u is not None:
        gate = F.linear(of.x if of.gate_x is None else of.gate_x, of.gate_u, of.gate_latent_bias)
    inner = FeedForwardOperands(
        up, of.up_v, of.down_u, activation=of.activation, up_bias=of.up_bias, gate=gate,
        gate_factor=of.gate_v, gate_bias=of.gate_bias, down_bias=of.down_latent_bias,
    )  # fmt: skip
    return F.linear(middle(inner), of.down_v, of.down_bias)
