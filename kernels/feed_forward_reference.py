"""The low-rank feed-forward written plainly: what streaming and row blocks are measured against.

Operands: ``feed_forward_operands.py``. The whole [T, F] is in memory (twice or more), and every
operator rounds to the dtype. Differentiable, in any dtype, on fake tensors with symbolic shapes.
"""

import torch.nn.functional as F
from flashsvd_compile.kernels.activations import ACTIVATIONS
from flashsvd_compile.kernels.feed_forward_operands import FeedForwardOperands
from torch import Tensor


def unfused_feed_forward(of: FeedForwardOperands) -> Tensor:
    """S [T, R_d], one library operator after another."""
    act = ACTIVATIONS[of.activation].function
    hidden = F.linear(of.up, of.up_factor, of.up_bias)
    if of.gate is None or of.gate_factor is None:
        hidden = act(hidden)
    else:
        hidden = act(F.linear(of.gate, of.gate_factor, of.gate_bias)) * hidden
    return F.linear(hidden, of.down_factor, of.down_bias)
