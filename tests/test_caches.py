"""Inductor's and AOTAutograd's caches hit across processes, and never after a change of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Compiles the same low-rank feed-forward once for each JSON line given: the options, and whether
# the package's sources are to look changed. Tells the caches' counters.
PROGRAM = """
import json, sys, torch
from torch import nn
from torch._dynamo.utils import counters
from flashsvd_compile import fingerprint

sources = fingerprint._sources()
low_rank = lambda i, o: nn.Sequential(nn.Linear(i, 4, bias=False), nn.Linear(4, o))
torch.manual_seed(0)
model = nn.Sequential(*low_rank(12, 40), nn.GELU(), *low_rank(40, 12))
x = torch.randn(5, 12)
for line in sys.argv[1:]:
    options, changed, training = json.loads(line)
    torch._dynamo.reset()
    counters.clear()
    fingerprint._sources = (lambda: "changed") if changed else (lambda: sources)
    with torch.set_grad_enabled(training):
        result = torch.compile(model, backend="flashsvd", options=options)(x)
        torch.testing.assert_close(result, model(x))
        if training:
            result.sum().backward()
    caches = {}
    for kind, prefix in (("inductor", "fxgraph_cache_"), ("aot_autograd", "autograd_cache_")):
        for event in ("hit", "miss", "bypass"):
            caches[f"{kind}_{event}"] = counters[kind][prefix + event]
    print(json.dumps(caches))
"""

ROW_BLOCKS = {"feed_forward": "row_blocks"}
UNFUSED = {"feed_forward": "unfused"}


def told_by(program: str, caches: Path, *arguments: str) -> list[Any]:
    """What ``program`` prints, a JSON value a line, in a process of its own with those caches."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(caches)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """One directory for all programs, no two of which compile the same graph: C++ headers are
    compiled once for each."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture
def run(caches):
    """Runs lines in a process of its own."""

    def process(*lines):
        return told_by(PROGRAM, caches, *map(json.dumps, lines))

    return process


def outcome(caches):
    """``"hit"`` if no compile was needed, ``"miss"`` if none was found and one was kept."""
    assert caches["inductor_bypass"] == caches["aot_autograd_bypass"] == 0
    hit, missed = caches["aot_autograd_hit"], caches["aot_autograd_miss"]
    assert hit + missed == 1
    if missed:
        assert caches["inductor_hit"] == 0, "another graph's kernels were taken"
    return "hit" if hit else "miss"


def test_caches(run):
    first = run(
        (ROW_BLOCKS, False, False),
        (ROW_BLOCKS, True, False),
        (UNFUSED, False, False),
        (ROW_BLOCKS, False, True),
    )
    assert [outcome(c) for c in first] == ["miss"] * 4
    second = run(
        (ROW_BLOCKS, False, False),
        (ROW_BLOCKS | {"sram_budget": "64KiB"}, False, False),
        (ROW_BLOCKS | {"chain": "unfused"}, False, False),
        (ROW_BLOCKS | {"debug_dir": None}, False, False),
        (ROW_BLOCKS, False, True),
    )
    assert [outcome(c) for c in second] == ["hit", "miss", "miss", "hit", "hit"]


CONSTANTS = """
import json, torch
from torch._dynamo.utils import counters
for values in ([[1.0, 2.0]], [[3.0, 4.0]]):
    torch._dynamo.reset()
    def scale(x):
        return x.mm(torch.tensor(values))
    result = torch.compile(scale, backend="flashsvd")(torch.ones(1, 1))
    assert result.tolist() == values, (result, values)
print(json.dumps(counters["aot_autograd"]))
"""


def test_constants_are_told_apart(caches):
    (told,) = told_by(CONSTANTS, caches)
    assert told["autograd_cache_miss"] == 2


def test_the_fingerprint_covers_every_room():
    from flashsvd_compile import fingerprint

    names = [name for name, _ in fingerprint._files()]
    assert len(names) == len(set(names))
    for name in ("flashsvd_compile/normalize.py", "kernels/attention.py", "lowering/ops.py",
                 "flashsvd_compile/analysis/sweep.py"):  # fmt: skip
        assert any(found.endswith(name) for found in names), name


def test_the_fingerprint_reads_the_files(tmp_path, monkeypatch):
    from flashsvd_compile import fingerprint
    from flashsvd_compile.options import Options

    source = tmp_path / "kernel.py"
    monkeypatch.setattr(fingerprint, "_files", lambda: iter([("kernel.py", source)]))
    prints = []
    for text in ("a = 1", "a = 2", "a = 1"):
        source.write_text(text)
        fingerprint._sources.cache_clear()
        prints.append(fingerprint.fingerprint(Options()))
    fingerprint._sources.cache_clear()
    assert prints[0] == prints[2] != prints[1]
    shaping = {"attention": "unfused", "feed_forward": "unfused", "siblings": "merged",
               "keep": 0.5, "weight_budget": 64}  # fmt: skip
    changed = [Options(**{name: value}) for name, value in shaping.items()]
    assert len({fingerprint.fingerprint(options) for options in (Options(), *changed)}) == 6


FACTORED = """
import copy, json, sys, torch
from torch import nn
from torch._dynamo.utils import counters
from flashsvd_compile import compress_
for seed in (0, 1, 0):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(seed)
    model, x = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 20)), torch.randn(5, 20)
    with torch.no_grad():
        result = torch.compile(model, backend="flashsvd", options={"keep": 0.5})(x)
        low = copy.deepcopy(model)
        compress_(low, keep=0.5)
        torch.testing.assert_close(result, low(x))
    caches = counters["aot_autograd"]
    print(json.dumps([caches["autograd_cache_" + event] for event in ("hit", "miss", "bypass")]))
"""


def test_factors_are_no_part_of_what_caches_keep(caches):
    """A model of the same shapes takes the kept kernels, and brings its own factors."""
    told = told_by(FACTORED, caches)
    assert told == [[0, 1, 0], [1, 0, 0], [1, 0, 0]]
