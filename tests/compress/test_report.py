"""The report reads as a table and stores as plain values."""

import dataclasses
import json

import pytest

from flashsvd_compile.compress.report import CompressReport, CompressRow

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
