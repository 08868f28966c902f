"""Text that ships with Python: topics of ``help()``, split so that no paragraph is in two parts.

Bytes are the tokens: the vocabulary is the same for any text, so that nothing of what is held out
can enter by way of a tokenizer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Tensor

VOCABULARY = 256
# Of every ten topics, ordered by length, one is held out and one calibrates.
TURN, HELD_OUT, CALIBRATION = 10, 4, 9


@dataclass(frozen=True)
class Split:
    """The bytes [n] of each part, as int64."""

    training: Tensor
    calibration: Tensor
    held_out: Tensor


def split() -> Split:
    parts: dict[str, list[str]] = {"training": [], "calibration": [], "held_out": []}
    for index, text in enumerate(sorted(distinct_topics().values(), key=len)):
        place = {HELD_OUT: "held_out", CALIBRATION: "calibration"}.get(index % TURN, "training")
        parts[place].append(text)
    return Split(**{name: tokens("\n\n".join(texts)) for name, texts in parts.items()})


def distinct_topics() -> dict[str, str]:
    """By name. Long topics repeat short ones whole: each paragraph stays in the shortest of its
    topics."""
    seen: set[str] = set()
    distinct = {}
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        own = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                own.append(paragraph.strip("\n"))
        if own:
            distinct[name] = "\n\n".join(own)
    return distinct


def tokens(text: str) -> Tensor:
    return torch.tensor(list(text.encode()))


def text_of(tokens: Tensor) -> str:
    """A character that is cut is shown as one that is unknown."""
    return bytes(tokens.tolist()).decode(errors="replace")


def windows(part: Tensor, length: int) -> Tensor:
    """``part`` cut into rows [n, length], what is left over dropped."""
    return part[: len(part) // length * length].view(-1, length)


def batches(part: Tensor, length: int, rows: int) -> Iterator[dict[str, Tensor]]:
    """Its windows as inputs of a causal model, which shifts labels itself."""
    for batch in windows(part, length).split(rows):
        yield {"input_ids": batch, "labels": batch}
