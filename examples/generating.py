"""Greedy decoding by any way to run a model: the same ``generate``, another forward."""

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
    model: Any, forward: Callable[..., Any], prompts: Tensor, new: int, room: int | None = None
) -> Continuation:
    """``new`` greedy tokens after each row of ``prompts``, ``model`` run by ``forward``.

    The cache has room for ``room`` tokens more, so that a shorter continuation, too, is made by
    the graphs that a longer one has compiled.
    """
    cache = StaticCache(model.config, max_cache_len=prompts.shape[1] + (room or new))
    model.forward = forward
    try:
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new,
            past_key_values=cache, do_sample=False, disable_compile=True, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    finally:
        del model.forward
    return Continuation(out.sequences[:, prompts.shape[1] :], torch.stack(out.logits, 1))
