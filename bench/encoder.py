"""A whole encoder at fixed ranks, ours beside every way to run it without us.

    python -m bench.encoder [--case bert:32x512:bfloat16] [--case vit:128x197:bfloat16]

BERT-base's or ViT-B/16's shape, 12 layers, rank 40 a head for q, k and v, rank 240 elsewhere;
BERT with a padding mask of ragged lengths. `tf32` is float32 whose matrix products may use TF32.
Interleaved medians, host and device, after the gate: ours may err against a float64 run of the
same low-rank model by no more than 1.1 times what eager errs.
"""

import argparse
import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

import flashsvd_compile as fsc
from bench.contest import compare
from bench.measure import environment, write_results
from bench.targets import Target
from flashsvd_compile.compress.modules import LowRankLinear, PerHeadLowRankLinear

HEAD_RANK = 40
RANK = 240
GATE = 1.1  # times eager's own error
PATCH = 16

# How a query, key or value projection is called, in the versions of transformers that we support.
PROJECTIONS = ("query", "key", "value", "q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Case:
    model: str
    batch: int
    length: int
    dtype: str

    @classmethod
    def parse(cls, text: str) -> "Case":
        """MODEL:BATCHxLENGTH:DTYPE"""
        try:
            model, sizes, dtype = text.split(":")
            batch, length = map(int, sizes.split("x"))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not MODEL:BATCHxLENGTH:DTYPE, as bert:32x512:bfloat16 is"
            ) from None
        if model not in MODELS or dtype not in DTYPES:
            raise argparse.ArgumentTypeError(
                f"{text!r}: models are {', '.join(MODELS)}; dtypes are {', '.join(DTYPES)}"
            )
        return cls(model, batch, length, dtype)

    @property
    def targets(self) -> list[Target]:
        """On a GPU: what rank space has to gain over Inductor, and to save of eager's bytes."""
        if self.dtype != "bfloat16":
            return [Target("ours", ("low-rank Inductor",), 1.0)]
        low_rank, dense = (1.4, 1.4) if self.length >= 2048 else (1.5, 1.3)
        return [
            Target("ours", ("low-rank Inductor",), low_rank),
            Target("ours", ("dense Inductor",), dense),
            Target("ours", ("low-rank eager",), 1.0, bytes_share=0.45),
        ]


def bert(length: int) -> nn.Module:
    return BertModel(BertConfig(max_position_embeddings=length), add_pooling_layer=False)


def vit(length: int) -> nn.Module:
    config = ViTConfig(image_size=image_size(length), patch_size=PATCH)
    return ViTModel(config, add_pooling_layer=False)


def image_size(length: int) -> int:
    """Pixels of the side of an image that is ``length`` tokens: a square of patches, a class."""
    side = math.isqrt(length - 1)
    if side * side + 1 != length:
        raise ValueError(f"ViT's length is a square and one, as 197 is, not {length}")
    return side * PATCH


MODELS: dict[str, Callable[[int], nn.Module]] = {"bert": bert, "vit": vit}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}

CASES = {
    "cuda": [
        "bert:32x512:bfloat16",
        "bert:8x2048:bfloat16",
        "vit:128x197:bfloat16",
        "bert:32x512:float32",
        "bert:32x512:tf32",
    ],
    "cpu": ["bert:4x256:float32"],
}


@torch.no_grad()
def main() -> None:
    args = parse_args()
    torch._dynamo.config.automatic_dynamic_shapes = False
    print(environment(args.device))
    rows = []
    for case in args.case:
        rows.append(measure(case, args.device))
        path = write_results(args.name, rows, args.device)  # each at once: a case takes a minute
    print(path)
    if not all(row["gate"] for row in rows):
        raise SystemExit("the correctness gate is red: the times above mean nothing")


def factored(model: nn.Module) -> nn.Module:
    """Replace every linear of the layers: q, k, v per head at HEAD_RANK, the others at RANK."""
    config: Any = model.config
    head_dim = config.hidden_size // config.num_attention_heads

    def low_rank(name: str, linear: nn.Linear) -> nn.Module:
        there: Any = {"device": linear.weight.device}
        if name not in PROJECTIONS:
            return LowRankLinear(linear.in_features, linear.out_features, RANK, **there)
        heads = config.num_attention_heads
        return PerHeadLowRankLinear(linear.in_features, heads, head_dim, HEAD_RANK, **there)

    return replaced_linears(model, low_rank).eval()


def replaced_linears(model: nn.Module, by: Callable[[str, nn.Linear], nn.Module]) -> nn.Module:
    """``model`` with what ``by`` makes of each linear and its name in the place of it."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, by(name, module))
    return model


def inputs_of(case: Case, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random pixels; or random tokens, each row padded after a length of its own, at least half."""
    if case.model == "vit":
        side = image_size(case.length)
        pixels = torch.randn(case.batch, 3, side, side, device=device)
        return {"pixel_values": pixels.to(dtype)}
    ids = torch.randint(0, 30000, (case.batch, case.length), device=device)
    lengths = torch.randint(case.length // 2, case.length + 1, (case.batch, 1), device=device)
    lengths[0] = case.length
    mask = (torch.arange(case.length, device=device) < lengths).long()
    return {"input_ids": ids, "attention_mask": mask}


def measure(case: Case, device: str) -> dict[str, Any]:
    torch._dynamo.reset()
    dtype = DTYPES[case.dtype]
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    dense = MODELS[case.model](case.length).eval().to(device)
    low_rank = factored(copy.deepcopy(dense))
    exact = copy.deepcopy(low_rank).double()
    dense.to(dtype)
    low_rank.to(dtype)
    inputs = inputs_of(case, device, dtype)
    runs: dict[str, Callable] = {
        "dense eager": dense,
        "dense Inductor": torch.compile(dense, backend="inductor"),
        "low-rank eager": low_rank,
        "low-rank Inductor": torch.compile(low_rank, backend="inductor"),
        "ours": torch.compile(low_rank, backend="flashsvd"),
    }
    calls: dict[str, Callable[[], Tensor]] = {
        name: lambda run=run: run(**inputs)[0]  # type: ignore[misc]
        for name, run in runs.items()
    }
    errors = errors_of(calls, exact, inputs)
    found = compare(case, calls, device, errors=errors, targets=case.targets)
    return (
        asdict(case)
        | found
        | {
            "lowerings": lowerings_of(low_rank, inputs),
            "gate": errors["ours"] <= GATE * errors["low-rank eager"],
        }
    )


def errors_of(
    calls: dict[str, Callable[[], Tensor]], exact: nn.Module, inputs: dict[str, Tensor]
) -> dict[str, float]:
    """Of each low-rank run against float64, relative, where no padding is."""
    doubled = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    one_by_one = (  # float64 activations of the whole batch need not fit
        exact(**{name: row[None] for name, row in zip(doubled, rows, strict=True)})[0].float()
        for rows in zip(*doubled.values(), strict=True)
    )
    reference = torch.cat(list(one_by_one))
    kept = inputs["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
    return {
        name: float((call()[kept].float() - reference[kept]).norm() / reference[kept].norm())
        for name, call in calls.items()
        if not name.startswith("dense")
    }


def lowerings_of(model: nn.Module, inputs: dict[str, Any]) -> dict[str, int]:
    """How many sites of each kind run how."""
    sites = fsc.explain(model, **inputs).sites
    return Counter(f"{site.kind}: {site.lowering}" for site in sites if site.lowering)


def parse_args() -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--case",
        action="append",
        type=Case.parse,
        help="MODEL:BATCHxLENGTH:DTYPE, may be given repeatedly",
    )
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--name", default="encoder", help="of the file in bench/results/")
    args = parser.parse_args()
    args.case = args.case or [Case.parse(text) for text in CASES[args.device]]
    return args


if __name__ == "__main__":
    main()
