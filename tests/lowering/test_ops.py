"""The compiler that follows sees a Triton kernel's launch as a node, and library operators not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "traced_launches.py"


def traced(*arguments: str) -> dict:
    """What the graph holds, traced by a process in which Triton is not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=environment | {"PYTHONPATH": str(SCRIPT.parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("shapes", ["static", "dynamic"])
def test_one_launch_writes_the_outputs_of_all_siblings(shapes):
    found = traced("siblings", "cuda:0", shapes)
    assert found["launches"] == ["triton_kernel_wrapper_functional"]
    assert found["copied"] == [["out0", "out1"]]
    assert found["operators"] == []
    assert found["guards"] == []


@pytest.mark.parametrize("shapes", ["static", "dynamic"])
@pytest.mark.parametrize(
    "name",
    ["attention", "described_attention", "rotated_attention", "banded_attention", "feed_forward",
     "whole", "chain"],
)  # fmt: skip
def test_a_launch_is_a_node_that_writes_its_output_only(name, shapes):
    found = traced(name, "cuda:0", shapes)
    assert found["launches"] == ["triton_kernel_wrapper_functional"]
    assert found["copied"] in ([["out"]], [["out_ptr"]])
    assert found["operators"] == []
    # That the batch fits one axis of a grid is all that is asked of sizes.
    assert len(found["guards"]) == ("attention" in name and shapes == "dynamic")


def test_one_block_of_rows_is_two_nodes():
    found = traced("one_block", "cuda:0", "static")
    assert found["launches"] == ["triton_kernel_wrapper_functional"]
    assert found["axes"] == [3]  # all that Inductor's launcher asks for
    assert found["copied"] == [["out"]]
    assert found["operators"] == []
    assert found["calls"][-1] == "aten.addmm.default"
    assert not any("scatter" in call or "copy" in call for call in found["calls"])


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("one_block", "dynamic"),  # more rows than one block may come
        ("one_block_of_an_odd_rank", "static"),
        ("one_block_on_library", "static"),
        ("two_blocks", "static"),
    ],
)
def test_other_blocks_of_rows_stay_whole(name, shapes):
    found = traced(name, "cuda:0", shapes)
    assert found["launches"] == []
    assert found["operators"] == ["flashsvd.row_blocks_feed_forward.default"]


@pytest.mark.parametrize("shapes", ["static", "dynamic"])
def test_a_traced_launch_describes_what_the_kernel_reads_by_descriptors(shapes):
    tile = ["stable", [[1, 1, 64, 64]]]
    (described,) = traced("described_attention", "cuda:0", shapes)["described"]
    assert described == {"k_described": tile, "v_described": tile}
    assert traced("attention", "cuda:0", shapes)["described"] == [{}]


def test_a_traced_launch_knows_how_rows_are_aligned():
    """Latents of rank 40 that are thirds of one tensor begin at multiples of 16 bytes."""
    found = traced("attention", "cuda:0", "dynamic")
    assert set(found["alignments"][0].values()) == {16}


def test_on_a_cpu_the_operator_stays_whole():
    found = traced("attention", "cpu", "static")
    assert found["launches"] == []
    assert found["operators"] == ["flashsvd.rank_space_attention.default"]
