"""Compiled kernels never read a uniform register that some path leaves unwritten.

ptxas 12.8, which Triton 3.6 ships, hoists the address of a matmul's operand into a block that a
branch can skip, and uses it after: the matmul then reads anywhere. Results alone show that only on
the inputs that take the branch, so the machine code itself is read.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import triton
from flashsvd_compile.kernels import (
    attention,
    attention_kernel,
    chain,
    feed_forward,
    feed_forward_whole,
    siblings,
)
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.chain_operands import ChainOperands
from flashsvd_compile.kernels.chain_tiles import ChainTile
from flashsvd_compile.kernels.feed_forward_operands import FeedForwardOperands
from flashsvd_compile.kernels.feed_forward_whole_operands import WholeFeedForwardOperands
from flashsvd_compile.kernels.siblings_operands import SiblingOperands
from flashsvd_compile.kernels.siblings_tiles import TILES, TILES_FEW_ROWS
from flashsvd_compile.kernels.tile_tables import candidates
from flashsvd_compile.kernels.tiles import TileConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
WRITES_UNIFORM = ("U", "S2UR", "R2UR", "REDUX", "CS2UR", "LDCU")
ALWAYS_WRITTEN = {63}  # URZ


def unwritten_reads(cubin: bytes) -> list[str]:
    """The instructions that may read a uniform register before it is written."""
    code, labels = disassembled(cubin)
    reads_and_writes = [uniform_registers(text) for text in code]
    written: list[set[int] | None] = [None] * len(code)
    written[0] = set(ALWAYS_WRITTEN)
    pending = [0]
    while pending:  # on every path: the intersection over all ways to get there
        index = pending.pop()
        after = (written[index] or set()) | reads_and_writes[index][1]
        for following in successors(code, labels, index):
            before = written[following]
            now = after if before is None else before & after
            if now != before:
                written[following] = set(now)
                pending.append(following)
    matmuls = {index for index, text in enumerate(code) if "MMA" in text}
    assert matmuls, "no matmul was found: is this still how machine code is written?"
    assert all(written[index] is not None for index in matmuls), "some matmul was not reached"
    return [
        f"{index}: {text}"
        for index, text in enumerate(code)
        if (known := written[index]) is not None and reads_and_writes[index][0] - known
    ]


def disassembled(cubin: bytes) -> tuple[list[str], dict[str, int]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [DISASSEMBLER, "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\S+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,6}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    return code, labels


def successors(code: list[str], labels: dict[str, int], index: int) -> list[int]:
    text = code[index]
    is_predicated = text.startswith("@") or re.search(r"BRA\S*\s+!?UP", text)
    found = []
    if target := re.search(r"BRA.*?(\.L_[^)\s`]+)", text):
        found.append(labels[target[1]])
    ends = re.match(r"(EXIT|BRA)\b", text) and not is_predicated
    if not ends and index + 1 < len(code):
        found.append(index + 1)
    return [i for i in found if i < len(code)]


def uniform_registers(text: str) -> tuple[set[int], set[int]]:
    """(read, written) by one instruction."""
    text = re.sub(r"^@!?U?P\w+\s+", "", text)
    op, _, rest = text.partition(" ")
    operands = [operand.strip() for operand in rest.split(",")]
    written: set[int] = set()
    if re.fullmatch(r"UP\d", operands[0]):  # some write a predicate ahead of the register
        operands = operands[1:]
    target = re.fullmatch(r"UR(\d+)", operands[0]) if operands else None
    if target and op.startswith(WRITES_UNIFORM):
        width = 2 if ".64" in op or "WIDE" in op else 4 if ".128" in op else 1
        written = {int(target[1]) + i for i in range(width)}
        operands = operands[1:]
    read: set[int] = set()
    for operand in operands:
        for register in map(int, re.findall(r"\bUR(\d+)", operand)):
            if "gdesc" in operand:  # the pair of B is the second; A's is used if A is no register
                both = len(operands) > 1 and operands[1].startswith("gdesc")
                read |= {register + i for i in (range(4) if both else (2, 3))}
            else:
                is_pair = "desc[" in operand or op.startswith("UIADD3.64")
                read |= {register, register + 1} if is_pair else {register}
    return read, written


def preferred(rank: int, is_causal: bool = False) -> TileConfig:
    """What a Hopper takes first for ranks that fill ``rank``."""
    traits = {"element_bytes": 2, "rank": rank, "is_causal": is_causal, "ranks_fill": True}
    tile = candidates("attention", "sm_90", traits, lambda tile: True).first
    assert tile is not None
    return tile


def compiled_by(kernel, call: Callable[[], object]) -> list[bytes]:
    """Machine code of what ``call`` launches."""
    cache = kernel.device_caches[torch.cuda.current_device()][0]
    cache.clear()
    call()
    assert cache
    return [entry.asm["cubin"] for entry in cache.values()]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def test_reads_of_unwritten_registers_are_found():
    assert uniform_registers("@!P0 UIADD3 UR4, UP0, UR6, 0x2, URZ") == ({6}, {4})
    assert uniform_registers("ULOP3.LUT UP0, UR31, UR27, 0x7f, URZ, 0xc0, !UPT") == ({27}, {31})
    assert uniform_registers("UIMAD.WIDE UR4, UR5, 0x8, URZ") == ({5}, {4, 5})
    assert uniform_registers("HGMMA.64x32x16.F32.BF16 R56, R84, gdesc[UR4], RZ")[0] == {6, 7}
    assert uniform_registers("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24")[0] == {4, 5, 6, 7}
    code = ["UMOV UR4, URZ", "@P0 BRA `(.L_x_1)", "UMOV UR5, URZ", "IADD3 R0, R1, UR5, RZ", "EXIT"]
    assert successors(code, {".L_x_1": 3}, 1) == [3, 2]
    assert successors(code, {}, 4) == []


@pytest.mark.parametrize("keys", [200, 256], ids=["ragged", "whole_tiles"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("mask", ["none", "scanned", "rows", "added"])
@pytest.mark.parametrize(
    ("rank", "tile"),
    [
        (32, replace(preferred(32), max_registers=0)),  # as Inductor launches it
        (32, preferred(32)),
        (16, preferred(16, is_causal=True)),
        (40, TileConfig(128, 32, 8, 4)),
        (64, TileConfig(64, 32, 4, 3)),
        (32, TileConfig(64, 64, 4, 3, is_described=True)),
        (64, TileConfig(64, 64, 4, 3, is_described=True)),
        (128, TileConfig(64, 64, 4, 3, is_described=True)),
        (128, TileConfig(64, 32, 4, 4, is_described=True)),
        (40, TileConfig(128, 64, 8, 3)),
        (96, preferred(128)),
    ],
    ids=str,
)
def test_attention(rank, tile, mask, is_causal, keys):
    q, k, v = (normal(1, 2, keys, rank) for _ in "qkv")
    operands = {f"{x}_factor": normal(2, 64, rank) for x in "qkv"}
    operands |= {f"{x}_bias": normal(2, 64) for x in "qv"}
    shown = torch.rand(1, 1, keys if mask in ("rows", "added") else 1, keys, device="cuda") > 0.3
    operands["mask"] = {"none": None, "added": shown.float()}.get(mask, shown)
    launch = partial(
        attention.rank_space_attention,
        AttentionOperands(q, k, v, **operands, num_heads=2, is_causal=is_causal, scale=0.125),
        tile=tile,
    )
    for cubin in compiled_by(attention_kernel.rank_space_attention_kernel, launch):
        assert unwritten_reads(cubin) == []


@pytest.mark.parametrize("rank_gate", [None, 64, 300])
@pytest.mark.parametrize("rank", [16, 64, 240, 300])
def test_feed_forward(rank, rank_gate):
    gate = {}
    if rank_gate is not None:
        gate = {"gate": normal(200, rank_gate), "gate_factor": normal(400, rank_gate)}
    of = FeedForwardOperands(
        normal(200, rank), normal(400, rank), normal(min(rank, 256), 400),
        activation="silu", up_bias=normal(400), **gate,
    )  # fmt: skip
    launch = partial(feed_forward.streamed_feed_forward, of)
    for cubin in compiled_by(feed_forward._feed_forward_kernel, launch):
        assert unwritten_reads(cubin) == []


@pytest.mark.parametrize("gate", ["none", "latent", "x", "own"])
@pytest.mark.parametrize("hidden", [200, 768])
@pytest.mark.parametrize(("rank_up", "rank_down"), [(16, 16), (37, 96), (64, 64), (240, 240)])
def test_feed_forward_streamed_whole(rank_up, rank_down, hidden, gate):
    given = {} if gate == "none" else {"gate_v": normal(400, rank_up)}
    if gate in ("x", "own"):
        given = {"gate_u": normal(16, hidden), "gate_v": normal(400, 16)}
    if gate == "own":
        given["gate_x"] = normal(200, hidden)
    of = WholeFeedForwardOperands(
        normal(200, hidden), normal(rank_up, hidden), normal(400, rank_up),
        normal(rank_down, 400), normal(hidden, rank_down),
        activation="silu", up_bias=normal(400), down_bias=normal(hidden), **given,
    )  # fmt: skip
    launch = partial(feed_forward_whole.streamed_whole_feed_forward, of)
    for cubin in compiled_by(feed_forward_whole.whole_feed_forward_kernel, launch):
        assert unwritten_reads(cubin) == []


@pytest.mark.parametrize("rank", [16, 64, 240])
@pytest.mark.parametrize("hidden", [200, 768])
@pytest.mark.parametrize("tile", [None, ChainTile(16, 64, 4, 3), ChainTile(64, 64, 4, 3)], ids=str)
def test_chain(tile, hidden, rank):
    of = ChainOperands(normal(300, hidden), normal(rank, hidden), normal(hidden, rank))
    for cubin in compiled_by(chain.chain_kernel, partial(chain.streamed_chain, of, tile=tile)):
        assert unwritten_reads(cubin) == []


@pytest.mark.parametrize("is_transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("width", [480, 1490])
@pytest.mark.parametrize("tile", [*TILES, *TILES_FEW_ROWS], ids=str)
def test_siblings(tile, width, is_transposed):
    shape = (200, width) if is_transposed else (width, 200)
    weights = tuple(normal(*shape).t() if is_transposed else normal(*shape) for _ in "abc")
    of = SiblingOperands(normal(333, 200), weights, (normal(width), None, None))
    launch = partial(siblings.sibling_linears, of, tile=tile)
    for cubin in compiled_by(siblings.sibling_linears_kernel, launch):
        assert unwritten_reads(cubin) == []
