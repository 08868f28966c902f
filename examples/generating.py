"""Greedy decoding with any way to run a model, over a cache of a fixed size."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache


@dataclass(frozen=True)
class Continuation:
    """``tokens`` [rows, new], and the ``logits`` [rows, new, vocabulary] that chose them."""

    tokens: Tensor
    logits: Tensor


@torch.no_grad()
def continued(
    run: Callable[..., Any], config: Any, prompts: Tensor, new: int, room: int | None = None
) -> Continuation:
    """``new`` greedy tokens after each row of ``prompts``.

    The cache has room for ``room`` of them, ``new`` unless told: a short continuation is made by
    the graphs that a longer one has compiled, one for the prompt and one for each step.
    """
    cache = StaticCache(config=config, max_cache_len=prompts.shape[1] + (room or new))
    chosen, logits, ids = [], [], prompts
    for _ in range(new):
        # The cache by its place, after mask and positions: its name changes within transformers 5.
        out = run(ids, None, None, cache, use_cache=True, logits_to_keep=1)
        logits.append(out.logits[:, -1])
        ids = logits[-1].argmax(-1, keepdim=True)
        chosen.append(ids)
    return Continuation(torch.cat(chosen, 1), torch.stack(logits, 1))
