"""Options are parsed once; a wrong name or value is told with the nearest right one."""

from pathlib import Path

import pytest
import torch

from flashsvd_compile.options import Options, OptionsError, cache_directory

RIGHT = {
    "nothing": ({}, {}),
    "strings": (
        {"compiler": "eager", "attention": "unfused", "feed_forward": "row_blocks"},
        {"compiler": "eager", "attention": "unfused", "feed_forward": "row_blocks"},
    ),
    "streamed": (
        {"feed_forward": "streamed_whole", "chain": "streamed"},
        {"feed_forward": "streamed_whole", "chain": "streamed"},
    ),
    "siblings": ({"siblings": "merged"}, {"siblings": "merged"}),
    "bytes_number": ({"sram_budget": 4096}, {"sram_budget": 4096}),
    "bytes_binary": ({"sram_budget": "99KiB"}, {"sram_budget": 99 * 1024}),
    "bytes_decimal": ({"sram_budget": "1.5 MB"}, {"sram_budget": 1_500_000}),
    "bytes_none": ({"sram_budget": None}, {"sram_budget": None}),
    "keep": ({"keep": 0.5}, {"keep": 0.5}),
    "keep_none": ({"keep": None, "weight_budget": None}, {}),
    "weight_budget": ({"weight_budget": "200MiB"}, {"weight_budget": 200 * 2**20}),
    "weight_budget_alone": ({"keep": None, "weight-budget": 64}, {"weight_budget": 64}),
    "autotune_on": ({"autotune": True}, {"autotune": True}),
    "autotune_off": ({"autotune": False}, {"autotune": False}),
    "autotune_auto": ({"autotune": "auto"}, {}),
    "path": ({"debug_dir": "some/where"}, {"debug_dir": Path("some/where")}),
    "dash": ({"sram-budget": 64}, {"sram_budget": 64}),
    "inductor": ({"max_autotune": True}, {"inductor": {"max_autotune": True}}),
    "inductor_dash": ({"triton.unique-kernel-names": True},
                      {"inductor": {"triton.unique_kernel_names": True}}),
}  # fmt: skip

WRONG = {
    "name": ({"atention": "auto"}, ["unknown option 'atention'", "'attention'"]),
    "inductor_name": ({"max_autotun": True}, ["'max_autotun'", "'max_autotune'"]),
    "inductor_type": ({"max_autotune": "yes"}, ["max_autotune", "str", "bool"]),
    "value": ({"attention": "rank-space"}, ["'rank-space'", "'rank_space'", "unfused"]),
    "chain": ({"chain": "row_blocks"}, ["value of chain 'row_blocks'", "streamed", "unfused"]),
    "siblings": ({"siblings": "fused"}, ["'fused'", "'unfused'", "merged"]),
    "value_type": ({"compiler": 3}, ["compiler", "3", "aot_eager"]),
    "autotune_word": ({"autotune": "yes"}, ["autotune", "'yes'", "auto", "True", "False"]),
    "autotune_number": ({"autotune": 1}, ["autotune", "1", "True"]),
    "unit": ({"sram_budget": "99KoB"}, ["sram_budget", "'KoB'", "KB"]),
    "no_number": ({"sram_budget": "KiB"}, ["sram_budget", "99KiB"]),
    "zero": ({"sram_budget": 0}, ["at least one byte"]),
    "bool": ({"sram_budget": True}, ["at least one byte"]),
    "list": ({"sram_budget": [1]}, ["sram_budget", "99KiB"]),
    "path": ({"debug_dir": 3}, ["debug_dir", "path"]),
    "keep_all": ({"keep": 1}, ["keep=1", "between 0 and 1"]),
    "keep_nothing": ({"keep": 0.0}, ["keep=0.0", "between 0 and 1"]),
    "keep_nan": ({"keep": float("nan")}, ["keep=nan", "between 0 and 1"]),
    "keep_bool": ({"keep": True}, ["keep=True", "between 0 and 1"]),
    "keep_word": ({"keep": "half"}, ["keep='half'", "between 0 and 1"]),
    "budget_unit": ({"weight_budget": "200 megs"}, ["weight_budget", "'megs'"]),
    "budget_zero": ({"weight_budget": 0}, ["weight_budget=0", "at least one byte"]),
    "both": ({"keep": 0.5, "weight_budget": "1GiB"}, ["keep and weight_budget", "give one"]),
}


@pytest.mark.parametrize(("given", "expected"), RIGHT.values(), ids=RIGHT)
def test_right(given, expected):
    assert Options.parse(given) == Options(**expected)


@pytest.mark.parametrize(("given", "told"), WRONG.values(), ids=WRONG)
def test_wrong(given, told):
    with pytest.raises(OptionsError) as error:
        Options.parse(given)
    assert [part for part in told if part not in str(error.value)] == []


def test_parsed_options_stay():
    options = Options(attention="unfused")
    assert Options.parse(options) is options


@pytest.mark.parametrize("mode", [None, "default"])
def test_default_modes(mode):
    assert Options.parse(None, mode) == Options()


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_are_inductors(mode):
    assert dict(Options.parse(None, mode).inductor) == torch._inductor.list_mode_options(mode)


def test_unknown_mode():
    with pytest.raises(OptionsError, match=r"unknown mode 'reduce_overhead'.*'reduce-overhead'"):
        Options.parse(None, "reduce_overhead")


def test_frozen():
    options = Options.parse({"max_autotune": True})
    with pytest.raises(AttributeError):
        options.attention = "unfused"
    with pytest.raises(TypeError):
        options.inductor["max_autotune"] = False


@pytest.mark.parametrize(
    ("given", "mode", "times_unknown", "times_measured"),
    [
        ({}, None, True, False),
        ({"autotune": False}, None, False, False),
        ({"autotune": True}, None, True, True),
        (None, "max-autotune", True, True),
        (None, "reduce-overhead", True, False),
        ({"max_autotune": True}, None, True, True),
        ({"max_autotune": True, "autotune": False}, None, False, False),
    ],
)
def test_when_tiles_are_timed(given, mode, times_unknown, times_measured):
    options = Options.parse(given, mode)
    assert options.times_tiles(is_measured=False) == times_unknown
    assert options.times_tiles(is_measured=True) == times_measured


def test_where_measurements_are_kept(monkeypatch):
    for name in ("FLASHSVD_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_directory() == Path("/home/me/.cache/flashsvd_compile")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_directory() == Path("/caches/flashsvd_compile")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/scratch/inductor")
    assert cache_directory() == Path("/scratch/inductor/flashsvd")
    monkeypatch.setenv("FLASHSVD_CACHE_DIR", "/scratch/own")
    assert cache_directory() == Path("/scratch/own")
