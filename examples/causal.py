"""A causal model, all the way: trained, compressed, compiled, checked, timed, and made to write.

    python -m examples.causal

Trains a small Llama (bytes, grouped-query attention, RoPE) on the topics of Python's ``help()``,
and factors copies of it in three ways to the same share of their parameters: by plain SVD,
"whitened", and "planned", the last two calibrated by topics that are neither trained on nor tested
on. Then it runs on topics that are held out

- the dense model under Inductor;
- the planned one in eager and under Inductor ("unfused": full-width activations);
- the planned one under ``torch.compile(backend="flashsvd")``, ours.

Ours must give the logits of the planned model in eager, up to what eager itself rounds, and the
same greedy tokens; else the exit status is 1, and nothing is timed. In bfloat16 on a GPU where
there is one, else in float32 on the CPU.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import flashsvd_compile as fsc
from bench.measure import environment
from examples.agreement import DisagreementError, budget_of, check_logits, check_tokens
from examples.generating import continued
from examples.speed import Rates, rates_of
from examples.topics import batches, split, text_of, windows
from examples.training import LENGTH, perplexity, train, untrained

METHODS = ("svd", "whitened", "planned")
ROWS = 8  # prompts at once
CALIBRATION_ROWS = 8
OURS = ("planned", "flashsvd")
# Ways to run a model, (model, backend); comparisons whose speed would tell nothing have none.
UNTIMED = [("svd", "eager"), ("whitened", "eager")]
TIMED = [("dense", "inductor"), ("planned", "eager"), ("planned", "inductor"), OURS]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_args(arguments)
    # Three graphs for each of three compiled models, all counted by the same forward.
    with torch._dynamo.config.patch(recompile_limit=16, fail_on_recompile_limit_hit=True):
        return shown(args)


def shown(args: argparse.Namespace) -> int:
    print(", ".join(f"{name} {value}" for name, value in environment(args.device).items()))
    parts = split()
    dense = untrained(args.device, args.seed)
    train(dense, parts.training, args.steps, args.seed)
    models = {"dense": dense, **compressed(dense, parts.calibration, args.keep)}
    with tempfile.TemporaryDirectory() as scratch:
        models["planned"] = read_back(models["planned"], args.save or scratch, args.device)
    for model in models.values():
        model.to(dtype=torch.bfloat16 if args.device == "cuda" else torch.float32)

    prompts = windows(parts.held_out, LENGTH)[: args.rows].to(args.device)
    with torch.no_grad():
        sites = fsc.explain(models["planned"], input_ids=prompts, use_cache=False)
        print(f"\n{str(sites).splitlines()[0]}")
    runs = {way: run_of(models[way[0]], way[1], args.compiler) for way in TIMED}
    try:
        print(f"{agreed(models['planned'], runs[OURS], prompts, args.new)}\n")
    except DisagreementError as error:
        print(f"ours is wrong: {error}", file=sys.stderr)
        return 1
    speeds = {}
    if not args.untimed:
        speeds = rates_of(runs, dense.config, prompts, args.new)
    found = {}
    for way, run in ({way: models[way[0]] for way in UNTIMED} | runs).items():
        found[way] = perplexity(run, parts.held_out, args.rows, args.device)
    print(table(models, found, speeds))
    print(f"\n{story(runs[OURS], dense.config, prompts, args.new)}")
    return 0


def compressed(dense: nn.Module, part: Tensor, keep: float) -> dict[str, nn.Module]:
    """A copy by each method, all of the same bytes, but for what rounding of ranks leaves."""
    device = next(dense.parameters()).device
    calibration = [
        {name: ids.to(device) for name, ids in batch.items()}
        for batch in batches(part, LENGTH, CALIBRATION_ROWS)
    ]
    copies = {}
    for method in METHODS:
        copies[method] = copy.deepcopy(dense)
        given = None if method == "svd" else calibration
        fsc.compress_(copies[method], keep=keep, method=method, calibration=given)
    return copies


def read_back(model: nn.Module, directory: str, device: str) -> nn.Module:
    """What its files hold: from here on the model is the one that anybody would load."""
    fsc.save_pretrained(model, directory)
    return fsc.from_pretrained(directory, device=device)


def run_of(model: nn.Module, backend: str, compiler: str) -> Callable[..., Any]:
    """Graphs are compiled for the sizes that are met: Dynamo remembers by the code of a forward
    which sizes have changed, and would compile those for the second model that it is given for
    any size."""
    if backend == "flashsvd":
        options: dict[str, Any] = {"compiler": compiler}
        return torch.compile(model, backend=backend, options=options, dynamic=False)
    if "eager" in (backend, compiler):
        return model
    return torch.compile(model, backend=backend, dynamic=False)


@torch.no_grad()
def agreed(model: nn.Module, run: Callable[..., Any], prompts: Tensor, new: int) -> str:
    """How ``run`` and ``model`` in eager agree, in a line. Raises `DisagreementError`."""
    eager = model(input_ids=prompts, use_cache=False).logits
    exact = copy.deepcopy(model).double()(input_ids=prompts, use_cache=False).logits
    check_logits(run(input_ids=prompts, use_cache=False).logits, eager, exact)
    got, want = (continued(forward, model.config, prompts, new) for forward in (run, model))
    ties = check_tokens(got, want, budget_of(eager, exact))
    rows = f"{len(prompts)} times {new} greedy tokens"
    return f"ours agrees with eager: logits up to its rounding, {rows}" + (
        f", but for {ties} rows that part where two are equally likely" if ties else ""
    )


def table(
    models: dict[str, nn.Module],
    perplexities: dict[tuple[str, str], float],
    speeds: dict[tuple[str, str], Rates],
) -> str:
    headers = ["model, backend", "perplexity\na byte", "MiB of\nweights"]
    headers += ["prefill,\ntokens/s", "decode,\ntokens/s"] if speeds else []
    rows = []
    for (name, backend), found in perplexities.items():
        weights = sum(p.numel() * p.element_size() for p in models[name].parameters())
        row = [f"{name}, {backend}", f"{found:.3f}", f"{weights / 2**20:.2f}"]
        rows.append([*row, *(f"{rate:,.0f}" for rate in speeds.get((name, backend), ()))])
    right = ["right"] * (len(headers) - 1)
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", *right))


def story(run: Callable[..., Any], config: Any, prompts: Tensor, new: int) -> str:
    """The end of a held-out text, and after ``⟶`` what the compressed model makes of it."""
    text = text_of(continued(run, config, prompts, new).tokens[0])
    return f"{text_of(prompts[0])}⟶{text}"


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="of training")
    parser.add_argument("--keep", type=float, default=0.5, help="share of parameters to keep")
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", metavar="DIR", help="where the compressed model is kept")
    parser.add_argument("--rows", type=int, default=ROWS, help="prompts at once")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument(
        "--compiler", default="inductor", choices=("inductor", "eager"),
        help="of graphs; eager compiles nothing and is for a quick look",
    )  # fmt: skip
    parser.add_argument("--untimed", action="store_true", help="leave speeds out")
    args = parser.parse_args(arguments)
    if args.new < 2:
        parser.error("--new must be at least 2: the first token is the prefill's")
    return args


if __name__ == "__main__":
    sys.exit(main())
