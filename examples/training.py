"""A small Llama, trained from nothing on bytes, and how well it predicts others."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from examples.topics import VOCABULARY, windows

# Three million parameters; every two heads of queries share one of keys and values.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LENGTH = 256  # bytes a window
ROWS = 8  # windows a step
LEARNING_RATE, WARMUP = 3e-3, 20


def untrained(device: str, seed: int, **sizes: int) -> nn.Module:
    torch.manual_seed(seed)
    given: dict[str, Any] = SIZES | sizes
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **given,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.to(device)


def train(model: nn.Module, part: Tensor, steps: int, seed: int, rows: int = ROWS) -> None:
    """AdamW over windows that begin anywhere, the rate falling to nothing along a cosine."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    anywhere = part.unfold(0, LENGTH, 1)
    model.train()
    for _ in (bar := tqdm(range(steps), "train", disable=None)):
        chosen = torch.randint(len(anywhere), (rows,), generator=generator)
        ids = anywhere[chosen].to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"{loss.detach():.2f} nats a byte")
    model.eval()


@torch.no_grad()
def perplexity(run: Callable[..., Any], part: Tensor, rows: int, device: str) -> float:
    """Per byte, each window of ``part`` read for itself, ``rows`` at a time; fewer that are left at
    the end are dropped: they would take a graph of their own."""
    losses = []
    for batch in windows(part, LENGTH).split(rows):
        if len(batch) == rows:
            ids = batch.to(device)
            logits = run(input_ids=ids, use_cache=False).logits[:, :-1]
            losses.append(F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()))
    return math.exp(torch.stack(losses).mean())
