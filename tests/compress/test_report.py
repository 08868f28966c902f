"""The report reads as a table and stores as plain values."""

import dataclasses
import json
import sys

import pytest
import torch
from torch import nn

from flashsvd_compile.compress.compressing import compress_
from flashsvd_compile.compress.picture import figure_of, role_of
from flashsvd_compile.compress.report import CURVE_STEPS, CompressReport, CompressRow, curve_of

REPORT = CompressReport(
    keep=0.5,
    rows=(
        CompressRow("block.q", "per_head", 14, 4096, 2048, 0.25),
        CompressRow("head", "dense", None, 1024, 1024, 0.0, "its weight is shared with embed"),
    ),
    model_bytes_before=2**22,
    model_bytes_after=2**21,
)


def test_table_has_every_row_and_the_totals():
    lines = str(REPORT).splitlines()
    assert lines[0].split() == [
        "linear",
        "kind",
        "rank",
        "KiB",
        "before",
        "KiB",
        "after",
        "error",
        "of",
        "the",
        "loss",
        "reason",
    ]
    assert lines[2].split() == ["block.q", "per_head", "14", "4.0", "2.0", "0.250"]
    assert lines[3].endswith("its weight is shared with embed")
    assert lines[-1] == (
        "1 of 2 linear layers factored by svd at keep=0.5; all parameters: 4.0 MiB before, "
        "2.0 MiB after"
    )


def test_dict_is_plain():
    stored = json.loads(json.dumps(REPORT.to_dict()))
    assert stored["model_bytes_after"] == 2**21
    assert stored["rows"][1]["reason"] == "its weight is shared with embed"


def test_report_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        REPORT.keep = 1.0


# ---- curves and the picture ---------------------------------------------------------------------

LOSSES = [4.0, 3.0, 1.0, 0.5, 0.0]


def test_a_curve_is_a_share_at_few_ranks():
    assert curve_of(LOSSES, 2) == ((0, 1.0), (1, 0.75), (2, 0.25), (3, 0.125), (4, 0.0))
    long = curve_of([float(1000 - rank) for rank in range(1001)], 333)
    assert len(long) <= CURVE_STEPS + 2
    assert dict(long)[333] == pytest.approx(0.667)
    assert (long[0], long[-1]) == ((0, 1.0), (1000, 0.0))


def test_a_weight_of_zeros_loses_nothing():
    assert {lost for _, lost in curve_of([0.0, 0.0], 1)} == {0.0}


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("encoder.layer.11.output.dense", ("encoder.layer.*.output.dense", 11)),
        ("block.0.layer.1.wi", ("block.*.layer.1.wi", 0)),
        ("3.up", ("*.up", 3)),
        ("fc1.x2", ("fc1.x2", -1)),
        ("head", ("head", -1)),
    ],
)
def test_the_role_of_a_path(path, role):
    assert role_of(path) == role


def test_plot(tmp_path):
    curve = curve_of(LOSSES, 2)
    rows = [
        CompressRow(f"block.{block}.{name}", "matrix", 2, 400, 200, 0.1, curve=curve)
        for block in (0, 2, 10)
        for name in ("q", "k", "v", "o", "up")
    ]
    told = dataclasses.replace(REPORT, rows=(*rows, *REPORT.rows))
    told.plot(tmp_path / "ranks.png")
    told.plot(str(tmp_path / "ranks.svg"))
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert b"block.*.up" in (tmp_path / "ranks.svg").read_bytes().replace(b" ", b"")
    assert "matplotlib.pyplot" not in sys.modules
    panels = {axes.get_title(loc="left"): axes for axes in figure_of(told.rows).axes}
    assert panels.keys() >= {"ranks", "block.*.q", "block.*.up"}
    assert "head" not in panels  # nothing was lost there
    assert [label.get_text() for label in panels["ranks"].get_yticklabels()] == ["", "0", "2", "10"]


def test_plot_of_nothing_factored(tmp_path):
    dataclasses.replace(REPORT, rows=REPORT.rows[1:]).plot(tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").exists()


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"flashsvd_compile\[plot\]"):
        REPORT.plot(tmp_path / "ranks.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["svd", "fwsvd", "whitened", "planned"])
def test_every_method_tells_its_curves(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24))
    given = {} if method == "svd" else {"calibration": [torch.randn(64, 24) for _ in range(2)]}
    for row in compress_(model, keep=0.6, method=method, **given).rows:
        if row.kind == "dense":
            continue
        ranks, lost = zip(*row.curve, strict=True)
        assert row.rank in ranks
        assert (ranks[0], ranks[-1], lost[0]) == (0, 24, 1.0)
        assert list(lost) == sorted(lost, reverse=True)
        assert lost[-1] == pytest.approx(0, abs=1e-9)
