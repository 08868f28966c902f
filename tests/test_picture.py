"""The picture of memory: the numbers behind it, what is drawn, and that it is optional."""

import json
import sys
from unittest.mock import patch

import pytest
import torch

import flashsvd_compile as fsc
from flashsvd_compile.memory.picture import figure_of
from tests.spelled import OPTIONS
from tests.test_totals import Model

pytestmark = pytest.mark.usefixtures("fresh_inference")

PNG = b"\x89PNG\r\n\x1a\n"
MIB = 2**20


def given():
    return torch.randn(4, 512, 30)


def told(**kwargs):
    return fsc.explain(Model(), given(), options=OPTIONS, **kwargs)


def compile_into(directory, **options):
    options = {**OPTIONS, "debug_dir": directory, **options}
    torch.compile(Model(), backend="flashsvd", options=options)(given())
    return directory / "graph_0"


@pytest.fixture
def without_matplotlib(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)


# ---- numbers ------------------------------------------------------------------------------------


def test_steps_are_those_of_the_peaks():
    found = told()
    (memory,) = found.memory
    (peak,) = found.peaks
    worst = max(memory.after, key=lambda step: step.transient_bytes)
    assert (worst.node, worst.transient_bytes) == (peak.node, peak.transient_bytes)
    total = max(step.transient_bytes + step.returned_bytes for step in memory.after)
    assert total == peak.total_bytes


def test_what_is_returned_is_told_apart():
    last = told().memory[0].after[-1]
    assert last.returned_bytes == 4 * 512 * (30 + 44) * 4


def test_sites_are_marked_in_both():
    (memory,) = told().memory
    before = {step.node: step.site for step in memory.before}
    after = {step.node: step.site for step in memory.after}
    ours = next(name for name in after if "row_blocks" in name)
    assert after[ours] == "feed_forward"
    assert ours not in before
    assert "feed_forward" in before.values()
    for steps in (before, after):
        assert {"chain", None} <= set(steps.values())


def test_merged_siblings_are_marked():
    found = fsc.explain(Model(), given(), options={**OPTIONS, "siblings": "merged"})
    marks = {step.node: step.site for step in found.memory[0].after}
    assert [site for name, site in marks.items() if "sibling" in name] == ["siblings"]


def test_json(tmp_path):
    record = json.loads((compile_into(tmp_path) / "sites.json").read_text())
    steps = record["memory"]
    assert steps == told().memory[0].to_dict() == told().to_dict()["memory"][0]
    assert set(steps) == {"before", "after"}
    assert set(steps["before"][0]) == {"node", "transient_bytes", "returned_bytes", "site"}


def test_dynamic_sizes_are_those_of_the_example():
    x = given()
    torch._dynamo.mark_dynamic(x, 1)
    dynamic = fsc.explain(Model(), x, options=OPTIONS).memory[0]
    still = told().memory[0]
    for ours, theirs in ((dynamic.before, still.before), (dynamic.after, still.after)):
        assert [s.transient_bytes for s in ours] == [s.transient_bytes for s in theirs]


def test_nothing_is_walked_unless_asked():
    with patch("flashsvd_compile.pipeline.walk", side_effect=AssertionError):
        torch.compile(Model(), backend="flashsvd", options=OPTIONS)(given())


# ---- the picture --------------------------------------------------------------------------------


def test_panels():
    graphs = told().memory
    above, below = figure_of(graphs).axes
    assert above.get_ylim() == below.get_ylim()
    for axes, steps in ((above, graphs[0].before), (below, graphs[0].after)):
        transient, returned = (
            p for p in axes.patches if p.get_label() in ("transient", "returned")
        )
        held = [step.transient_bytes / MIB for step in steps]
        assert list(transient.get_data().values) == held
        assert list(transient.get_data().edges) == list(range(len(steps) + 1))
        assert returned.get_data().values[-1] == held[-1] + steps[-1].returned_bytes / MIB
        worst = max(steps, key=lambda step: step.transient_bytes)
        (told_peak,) = axes.texts
        assert told_peak.get_text().endswith(f"MiB transient at {worst.node}")
        bands = {c.get_label(): c for c in axes.collections}
        assert {"feed_forward", "chain"} <= set(bands)


def test_no_state_of_pyplot_is_touched():
    figure_of(told().memory)
    assert "matplotlib.pyplot" not in sys.modules


def test_debug_dir_has_the_picture(tmp_path):
    directory = compile_into(tmp_path)
    assert (directory / "memory.png").read_bytes().startswith(PNG)
    assert "matplotlib" not in (directory / "report.txt").read_text()


def test_plot(tmp_path):
    told().plot(tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_other_formats(tmp_path, suffix):
    told().plot(str(tmp_path / f"memory.{suffix}"))
    assert (tmp_path / f"memory.{suffix}").stat().st_size > 0


def test_several_graphs_and_none(tmp_path):
    model = Model()

    def broken(x):
        y, _ = model(x)
        torch._dynamo.graph_break()
        return model(y)

    found = fsc.explain(broken, given(), options=OPTIONS)
    above, _ = figure_of(found.memory).axes
    (cut,) = above.lines
    assert cut.get_xdata()[0] == len(found.memory[0].before)
    fsc.explain(lambda x: x, given()).plot(tmp_path / "nothing.png")
    assert (tmp_path / "nothing.png").read_bytes().startswith(PNG)


# ---- without matplotlib -------------------------------------------------------------------------


@pytest.mark.usefixtures("without_matplotlib")
def test_debug_dir_without_matplotlib(tmp_path):
    directory = compile_into(tmp_path)
    names = ["after.py", "before.py", "report.txt", "sites.json"]
    assert sorted(path.name for path in directory.iterdir()) == names
    lines = (directory / "report.txt").read_text().splitlines()
    assert [line for line in lines if "matplotlib" in line] == [
        'the picture needs matplotlib: pip install "flashsvd_compile[plot]"'
    ]


@pytest.mark.usefixtures("without_matplotlib")
def test_plot_without_matplotlib(tmp_path):
    with pytest.raises(ImportError, match=r"flashsvd_compile\[plot\]"):
        told().plot(tmp_path / "memory.png")
    assert not list(tmp_path.iterdir())
