"""What calibration tells of latents: roots of the moments of what is in them, and of gradients.

With H the moment of a layer's inputs, G that of the loss's gradient at its outputs (``fits.py``):

    layer    a = U H^½               b = Vᵀ G^½
    scores   a = [W_q H^½, bias]     b = G^½, G at queries, whose gradient lies among the keys
    values   a = H^½, H of what the  b = W_oᵀ G^½
             output reads

each [.., r, k], for ``balanced.py``.
"""

import torch
from torch import Tensor

from flashsvd_compile.compress.fits import root_of
from flashsvd_compile.compress.latents import NARROW, Latent, heads_of
from flashsvd_compile.compress.methods import MAX_OUTPUTS, why_dead
from flashsvd_compile.compress.moments import Moments, Watched

WANTS = frozenset({"inputs", "outputs"})


def watched(latent: Latent) -> Watched | str:
    """The layer at which the latent's metric is seen, or why it cannot be."""
    layer = latent.layers[1 if latent.kind == "values" else 0]
    rows: tuple[int, ...]
    if latent.kind == "layer":
        rows = tuple(latent.reads[0].parameter.shape[:-1])
    elif latent.kind == "scores":
        assert isinstance(layer.module, NARROW)
        rows = (layer.module.num_heads, layer.module.head_dim)
    else:
        rows = (layer.module.out_features,)
    if rows[-1] > MAX_OUTPUTS:
        return (
            f"its {rows[-1]} outputs are more than the {MAX_OUTPUTS} that a metric of gradients "
            "can have"
        )
    return Watched(layer.module, rows, WANTS)


def why_unseen(moments: Moments) -> str:
    """Empty where calibration told all that a metric needs."""
    return why_dead(moments, WANTS)


def roots(latent: Latent, moments: Moments) -> tuple[Tensor, Tensor]:
    """``a`` and ``b`` of the latent, float64."""
    assert moments.inputs is not None
    assert moments.outputs is not None
    inputs = moments.inputs.double() / moments.tokens
    outputs = moments.outputs.double()
    rank = latent.rank
    if latent.kind == "layer":
        return latent.writing() @ root_of(inputs), latent.reading() @ root_of(outputs)
    if latent.kind == "scores":
        weight, *bias = (side.by_rank(side.parameter.detach().double()) for side in latent.writes)
        a = torch.cat([weight @ root_of(inputs), *bias], -1)
        b = root_of(outputs[:, :rank, :rank])  # behind the latents heads are zeros
    else:
        heads = heads_of(latent.layers[1].module)
        own = inputs.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))
        own = own.diagonal(dim1=0, dim2=2).movedim(-1, 0)[:, :rank, :rank]
        (output,) = (side.by_rank(side.parameter.detach().double()) for side in latent.reads)
        a, b = root_of(own), output @ root_of(outputs)
    # Heads that share a latent: in the mean of what is in it, and the sum of what reads it.
    return latent.grouped(a) / latent.group**0.5, latent.grouped(b)
