"""What training brings back of a real model that was compressed: mean |Δcos| before and after.

    python -m bench.finetune [--keep 0.5] [--steps 800] [--lr 1e-4]

all-MiniLM-L6-v2 as `bench.fidelity` compresses it, "planned", then `fsc.finetune` against the dense
model, on sentences of Python's documentation and of the docstrings of its standard library. The 256
held-out sentences, and any that holds one of them or lies in one, are never among them.
"""

import argparse
import ast
import copy
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from tabulate import tabulate

import flashsvd_compile as fsc
from bench.fidelity import HELD_OUT, LAYERS, embedded
from bench.measure import environment, write_results
from bench.sentences import batches, documentation_sentences, loaded, similarity_shift

CALIBRATE = 256
EVERYTHING = 10**9
REPEATED = 3  # how often more sentences of the kind that is held out are read than docstrings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=32, help="sentences of like lengths")
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args()
    print(environment("cpu"))
    tokenizer, dense = loaded()
    found = documentation_sentences(EVERYTHING)
    calibration = list(batches(tokenizer, found[HELD_OUT : HELD_OUT + CALIBRATE]))
    held_out = list(batches(tokenizer, found[:HELD_OUT]))
    alike = without(found[:HELD_OUT], found[HELD_OUT:])
    text = without(found[:HELD_OUT], [*alike, *docstring_sentences()]) + alike * REPEATED
    print(f"{len(text)} sentences train, {HELD_OUT} are held out")

    model, expected = copy.deepcopy(dense), embedded(dense, held_out)
    print("compressing", flush=True)
    fsc.compress_(model, keep=args.keep, include=LAYERS, calibration=calibration)
    before = similarity_shift(embedded(model, held_out), expected)
    print(f"training, from {before:.4f}", flush=True)
    # They are the teacher's own, and Adam moves rows of rare words by noise.
    model.embeddings.requires_grad_(False)
    examples = [dict(tokenizer(x, truncation=True)) for x in text]
    start = time.perf_counter()
    fsc.finetune(
        model, dense, examples,
        args={
            "max_steps": args.steps, "learning_rate": args.lr, "use_cpu": True,
            "per_device_train_batch_size": args.batch, "logging_steps": 50,
        },
    )  # fmt: skip
    row = {
        "keep": args.keep, "sentences": len(text), "steps": args.steps, "batch": args.batch,
        "lr": args.lr, "s": time.perf_counter() - start, "mean |Δcos| before": before,
        "mean |Δcos| after": similarity_shift(embedded(model, held_out), expected),
    }  # fmt: skip
    print(tabulate([row], headers="keys", floatfmt=".4g"))
    write_results("finetune", [row], "cpu")


def without(held_out: list[str], sentences: list[str]) -> list[str]:
    """Those of ``sentences``, each once, that neither hold nor lie in one that is held out."""
    kept = [x.lower() for x in held_out]
    apart = (s for s in dict.fromkeys(sentences) if not any(
        x in s.lower() or s.lower() in x for x in kept))  # fmt: skip
    return list(apart)


def docstring_sentences() -> Iterator[str]:
    """Of the standard library, its tests left out, file after file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # samples of what is wrong
            continue
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            for paragraph in (text or "").split("\n\n"):
                yield from re.findall(r"[A-Z][^.]{40,400}\.(?=\s|$)", " ".join(paragraph.split()))


if __name__ == "__main__":
    main()
