"""What a compressed model is told while it is trained to do as its dense teacher does.

Of models with logits, KL(teacher ‖ student) over real tokens; of encoders, how far unit vectors e,
the means of hidden states over each sequence, are from the teacher's, and how far the cosines of
all pairs in a batch are, which search and clustering will see:

    POOLED · mean (1 − e · e*)  +  PAIRS · mean (e eᵀ − e* e*ᵀ)²        *: the teacher's

and of either, for the hidden states h of real tokens as the model returns them, the last and the
mean over those between layers:

    mean (h − h*)² / var h*

The states between say to each layer what it alone did wrong, and to a few hundred steps they are
worth more than as many again of the rest.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashsvd_compile.compress.moments import RealTokens, first_tensor, mask_of

# About as much as hidden states at the start; errors of cosines are some hundredths.
POOLED, PAIRS = 2.0, 10.0


def distillation(output: Any, wanted: Any, batch: Any) -> Tensor:
    """The loss of ``output`` against ``wanted``, the teacher's; a scalar.

    Raises ValueError where they have no tensor, or none of one shape.
    """
    real = RealTokens(mask_of(batch))
    logits = getattr(output, "logits", None), getattr(wanted, "logits", None)
    has_logits = all(isinstance(x, Tensor) for x in logits)
    y, t = logits if has_logits else (first_tensor(output), first_tensor(wanted))
    assert isinstance(y, Tensor)
    assert isinstance(t, Tensor)
    if y.shape != t.shape:
        raise ValueError(
            f"the model returns {[*y.shape]} and its teacher {[*t.shape]}; pass a loss of your own"
        )
    between = _between(output, wanted)
    layers = [_relative(a, b, real) for a, b in between]
    loss = sum(layers) / max(len(layers), 1)
    if has_logits:
        y, t = (real.of(x.float()).log_softmax(-1) for x in (y, t))
        return loss + F.kl_div(y, t, reduction="batchmean", log_target=True)
    loss = loss + _relative(y, t, real)
    if y.dim() != 3:
        return loss
    e, wanted_e = (embeddings(x.float(), real.mask) for x in (y, t))
    # 1 − cos of unit vectors, exactly 0 where they are the same
    loss = loss + POOLED * (e - wanted_e).square().sum(-1).mean() / 2
    count = len(e)
    shift = (e @ e.mT - wanted_e @ wanted_e.mT).square().sum() / max(count * (count - 1), 1)
    return loss + PAIRS * shift


def _between(output: Any, wanted: Any) -> Sequence[tuple[Tensor, Tensor]]:
    """Hidden states between layers, where both return them and they are alike."""
    ours, theirs = (getattr(x, "hidden_states", None) for x in (output, wanted))
    if not isinstance(ours, (tuple, list)) or not isinstance(theirs, (tuple, list)):
        return []
    if [x.shape for x in ours] != [x.shape for x in theirs]:
        return []
    return list(zip(ours[1:-1], theirs[1:-1], strict=True))


def _relative(y: Tensor, t: Tensor, real: RealTokens) -> Tensor:
    """The squared error over the variance of what is wanted, over real tokens."""
    tokens, wanted = real.of(y.float()), real.of(t.float())
    return F.mse_loss(tokens, wanted) / wanted.var().clamp_min(1e-12)


def embeddings(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Unit vectors [batch, features]: means of ``hidden`` [batch, tokens, features]."""
    if mask is None or mask.shape != hidden.shape[:2]:
        mask = torch.ones(hidden.shape[:2])
    kept = mask.to(hidden).unsqueeze(-1)
    return F.normalize((hidden * kept).sum(1), dim=-1)
