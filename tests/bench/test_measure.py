"""The measuring tools on calls whose allocations and order are known."""

import json

import pytest
import torch

from bench import measure
from bench.measure import environment, median_ms, peak_transient_bytes, write_results
from flashsvd_compile.memory.measured import measured_peak
from flashsvd_compile.tuning import timing

MIB = 2**20
SCALARS = 64  # bytes: an operation wraps its Python numbers into tensors


def blocks(count, device="cpu"):
    """``count`` MiB, freshly allocated."""
    return torch.empty(count * MIB, dtype=torch.uint8, device=device)


def kept():
    return blocks(3)


def released():
    first = blocks(4)
    del first
    return blocks(2)


def overlapping(device="cpu"):
    first = blocks(4, device)
    second = blocks(3, device)
    del first
    third = blocks(2, device)
    return second, third


def nested():
    """The large one is allocated and released within operations."""
    x = torch.ones(MIB // 4)
    return (x.repeat(8) + 1).sum()


CASES = {
    "kept": (kept, 3 * MIB),
    "released before the next": (released, 4 * MIB),
    "overlapping": (overlapping, 7 * MIB),
    "nested": (nested, 17 * MIB),
    "nothing": (lambda: None, 0),
}


@pytest.mark.parametrize(("fn", "expected"), CASES.values(), ids=CASES)
def test_cpu_peak_is_what_was_allocated(fn, expected):
    assert 0 <= peak_transient_bytes(fn, "cpu") - expected <= SCALARS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak_is_what_was_allocated():
    live = blocks(5, "cuda")
    assert peak_transient_bytes(lambda: overlapping("cuda"), "cuda") == 7 * MIB
    assert median_ms({"fill": live.zero_}, "cuda", rounds=3)["fill"] > 0


def test_what_was_live_before_does_not_count():
    stock = [blocks(8), blocks(8)]

    def fn():
        stock.pop()  # its release makes no room for what follows
        return blocks(1)

    assert peak_transient_bytes(fn, "cpu") == MIB
    assert stock == []


def test_candidates_run_in_turns(monkeypatch):
    calls = []
    clock = iter([0.0, 1e-3, 0.0, 5e-3, 0.0, 3e-3, 0.0, 6e-3, 0.0, 2e-3, 0.0, 7e-3])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    fns = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    assert median_ms(fns, "cpu", warmup=1, rounds=3) == pytest.approx({"a": 2.0, "b": 6.0})
    assert "".join(calls) == "ab" + "ababab"


def test_rounds_are_checked():
    with pytest.raises(ValueError, match="rounds must be at least 1 and warmup 0, got 0 and 3"):
        median_ms({"a": lambda: None}, "cpu", rounds=0)


def test_results_carry_their_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    path = write_results("attention", [{"shape": [1, 2], "ms": 0.5}], "cpu")
    assert path == tmp_path / "results" / "attention.json"
    stored = json.loads(path.read_text())
    assert stored["rows"] == [{"shape": [1, 2], "ms": 0.5}]
    assert stored["environment"] == environment("cpu")
    assert stored["environment"]["torch"] == torch.__version__
    assert stored["environment"]["device"]


def outputs_last():
    """4 MiB are gone before the 3 MiB that are returned are allocated, maybe in their place."""
    first = blocks(4)
    del first
    return {"out": blocks(3)}


@pytest.mark.parametrize(
    ("fn", "transient"),
    [(kept, 0), (overlapping, 4), (outputs_last, 4)],
    ids=["kept", "overlapping", "outputs last"],
)
def test_outputs_are_told_apart_on_a_cpu(fn, transient):
    found = measured_peak(fn, "cpu")
    assert 0 <= found.transient_bytes - transient * MIB <= SCALARS
    assert found.total_bytes >= found.transient_bytes
    assert not found.is_least


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_outputs_are_taken_off_the_cuda_peak():
    """5 MiB are returned, though only 3 of them are held when most is."""
    found = measured_peak(lambda: overlapping("cuda"), "cuda")
    assert (found.total_bytes, found.transient_bytes) == (7 * MIB, 2 * MIB)
    assert found.is_least
