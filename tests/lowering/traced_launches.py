"""Traces operators on tensors that only say they are on a GPU, and prints what the graph holds.

Run by `test_ops.py` in a process of its own: there Triton compiles instead of interpreting, and
takes its target from a driver that needs no device.
"""

import json
import sys
from dataclasses import astuple

import torch
import triton
from flashsvd_compile.kernels.lifted_activation_tiles import TILE
from flashsvd_compile.kernels.tiles import TileConfig
from flashsvd_compile.lowering import ops
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from triton.backends.compiler import GPUTarget


class Hopper:
    """What Triton asks of a driver in order to compile."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


class Attention(nn.Module):
    def __init__(self, rank: int, tile: TileConfig) -> None:
        super().__init__()
        self.rank, self.tile = rank, tile

    def forward(self, x: Tensor, factor: Tensor, mask: Tensor) -> tuple[Tensor]:
        batch, rows, _ = x.shape
        latents = [part.view(batch, rows, 4, self.rank).transpose(1, 2) for part in x.chunk(3, -1)]
        result = ops.rank_space_attention(
            *latents, factor, None, factor, factor, None, mask,
            num_heads=4, is_causal=False, scale=0.125, tile=list(astuple(self.tile)),
        )  # fmt: skip
        return (result,)


class RotatedAttention(nn.Module):
    def forward(self, x: Tensor, k: Tensor, factor: Tensor, angles: Tensor) -> tuple[Tensor]:
        q, v = (part.view(*x.shape[:2], 4, 64).transpose(1, 2) for part in x.chunk(2, -1))
        tables = angles.cos(), angles.sin()
        result = ops.rank_space_attention(
            q, k, v, factor, None, None, factor, None, None, None, None, *tables,
            num_heads=4, is_causal=True, scale=0.125, tile=list(astuple(TileConfig(64, 64, 4, 3))),
            rotary_dim=64, rotary_pair=32,
        )  # fmt: skip
        return (result,)


class BandedAttention(nn.Module):
    """Bounds that are made of sizes."""

    def forward(self, x: Tensor, factor: Tensor) -> tuple[Tensor]:
        batch, rows, _ = x.shape
        latents = [part.view(batch, rows, 4, 64).transpose(1, 2) for part in x.chunk(3, -1)]
        result = ops.rank_space_attention(
            *latents, factor, None, factor, factor, num_heads=4, is_causal=True, scale=0.125,
            ahead=rows - 70, behind=90 - rows, tile=list(astuple(TileConfig(64, 64, 4, 3))),
        )  # fmt: skip
        return (result,)


class FeedForward(nn.Module):
    def forward(self, x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor]:
        latent = x.flatten(0, 1)
        result = ops.streamed_feed_forward(
            latent, up, down, activation="gelu", tile=list(astuple(TileConfig(64, 64, 4, 3)))
        )
        return (result,)


class RowBlocks(nn.Module):
    def __init__(self, block_rows: int, tile: list[int]) -> None:
        super().__init__()
        self.block_rows, self.tile = block_rows, tile

    def forward(self, x: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> tuple[Tensor]:
        result = ops.row_blocks_feed_forward_op(
            x.flatten(0, 1), up, down, None, None, None, None, bias,
            activation="gelu", block_rows=self.block_rows, tile=self.tile,
        )  # fmt: skip
        return (result,)


class Whole(nn.Module):
    def forward(self, x: Tensor, *factors: Tensor) -> tuple[Tensor]:
        tile = [64, 64, 4, 3, 0, 0, 64, 64]
        x = x.flatten(0, 1)
        return (ops.streamed_whole_feed_forward(x, *factors, activation="gelu", tile=tile),)


class Chain(nn.Module):
    def forward(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor]:
        return (ops.streamed_chain(x.flatten(0, 1), u, v, tile=[64, 64, 4, 3, 0, 0, 64, 128]),)


class Siblings(nn.Module):
    def forward(self, x: Tensor, one: Tensor, other: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        latent = x.flatten(0, 1)
        first, second = ops.sibling_linears(
            latent, [one, other.t()], [bias], biased=[1], tile=[64, 64, 4, 3, 0, 0, 64]
        )
        return first, second


def sizes(device: str) -> dict[str, tuple[nn.Module, list[Tensor]]]:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def attention(rank: int, tile: TileConfig) -> tuple[nn.Module, list[Tensor]]:
        mask = empty(6, 1, 1, 77, dtype=torch.bool)
        return Attention(rank, tile), [empty(6, 77, 12 * rank), empty(4, 64, rank), mask]

    def row_blocks(
        block_rows: int, rank: int = 64, tile: TileConfig | None = TILE
    ) -> tuple[nn.Module, list[Tensor]]:
        module = RowBlocks(block_rows, [] if tile is None else list(astuple(tile)))
        return module, [empty(6, 77, rank), empty(256, rank), empty(64, 256), empty(64)]

    return {
        "one_block": row_blocks(512),
        "one_block_of_an_odd_rank": row_blocks(512, rank=63),
        "one_block_on_library": row_blocks(512, tile=None),
        "two_blocks": row_blocks(256),
        "attention": attention(40, TileConfig(64, 64, 4, 3)),
        "described_attention": attention(64, TileConfig(64, 64, 4, 3, is_described=True)),
        "rotated_attention": (
            RotatedAttention(),
            [empty(6, 77, 8 * 64), empty(6, 2, 77, 64), empty(4, 64, 64), empty(6, 77, 64)],
        ),
        "banded_attention": (BandedAttention(), [empty(6, 77, 12 * 64), empty(4, 64, 64)]),
        "whole": (
            Whole(),
            [empty(6, 77, 48), empty(40, 48), empty(256, 40), empty(64, 256), empty(48, 64)],
        ),
        "chain": (Chain(), [empty(6, 77, 48), empty(40, 48), empty(128, 40)]),
        "siblings": (Siblings(), [empty(6, 77, 64), empty(40, 64), empty(64, 48), empty(48)]),
        "feed_forward": (FeedForward(), [empty(6, 77, 64), empty(256, 64), empty(64, 256)]),
    }


def main() -> None:
    triton.runtime.driver.set_active(Hopper())
    name, device, is_dynamic = sys.argv[1], sys.argv[2], sys.argv[3] == "dynamic"
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    with FakeTensorMode():
        module, inputs = sizes(device)[name]
    variable = {6, 77} if is_dynamic else set()
    traced = [
        mode.from_tensor(
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"),
            symbolic_context=StatelessSymbolicContext(
                [DimDynamic.DUCK if n in variable else DimDynamic.STATIC for n in x.shape]
            ),
        )
        for x in inputs
    ]
    with mode:
        traced = [torch.empty(x.shape, dtype=x.dtype, device=device) for x in traced]
    graph = aot_export_module(module, traced, trace_joint=False)[0].graph
    launches = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    record = {
        "calls": [str(n.target) for n in graph.nodes if n.op == "call_function"],
        "operators": [str(n.target) for n in graph.nodes if "flashsvd" in str(n.target)],
        "launches": [str(node.target) for node in launches],
        "axes": [len(grid) for node in launches for grid in node.kwargs["grid"]],
        "copied": [node.kwargs["tensors_to_clone"] for node in launches],
        "described": [node.kwargs["tma_descriptor_metadata"] for node in launches],
        "alignments": [
            {k: v for k, v in node.kwargs["kwargs"].items() if k.startswith("ALIGNED")}
            for node in launches
        ],
        "guards": [str(guard.expr) for guard in shapes.guards],
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
