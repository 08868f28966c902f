"""Random calls of every kernel with any of its tiles, and what is foreseen of each."""

import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from flashsvd_compile.kernels import (
    attention,
    attention_extents,
    attention_tiles,
    chain,
    chain_tiles,
    feed_forward,
    feed_forward_tiles,
    feed_forward_whole,
    feed_forward_whole_tiles,
    lifted_activation,
    lifted_activation_tiles,
    siblings,
    siblings_tiles,
)
from flashsvd_compile.kernels.activations import ACTIVATIONS
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.chain_operands import ChainOperands
from flashsvd_compile.kernels.feed_forward_operands import FeedForwardOperands
from flashsvd_compile.kernels.feed_forward_whole_operands import WholeFeedForwardOperands
from flashsvd_compile.kernels.siblings_operands import SiblingOperands
from flashsvd_compile.kernels.tile_tables import PORTABLE, tables_of
from flashsvd_compile.kernels.tiles import TileConfig
from torch import Tensor

# Most weight on what tables were measured on.
GENERATIONS = {"sm_90": 6, "sm_80": 2, "sm_86": 1, "sm_89": 1, "sm_120": 2}
DTYPES = {"bfloat16": 3, "float16": 2, "float32": 2}
STAGES = (1, 2, 3, 4, 5)


def pick(rng: random.Random, weights: dict[Any, int]) -> Any:
    return rng.choices(list(weights), list(weights.values()))[0]


def any_rank(rng: random.Random, most: int) -> int:
    """Odd, even, of eights, of sixteens, or a power of two."""
    step = rng.choice((1, 2, 8, 16, 16))
    if rng.random() < 0.3:
        return min(most, 1 << rng.randint(4, 9))
    return max(step, rng.randint(1, most) // step * step)


def empty(*shape: int, dtype: str) -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype))


def listed(kernel: str) -> list[TileConfig]:
    """All tiles of a kernel's tables, whatever they are for."""
    tables = [t for name in ("sm_90", PORTABLE) for t in tables_of(kernel, name)]
    return [TileConfig(*fields) for fields in dict.fromkeys(x for t in tables for x in t.tiles)]


def any_tile(rng: random.Random, tiles: Iterable[Any], *, described: bool = False) -> Any:
    """Of a list, or one like it."""
    tile = rng.choice([t for t in tiles if described or not t.is_described])
    if rng.random() < 0.5:
        tile = replace(tile, num_stages=rng.choice(STAGES))
    return tile


@dataclass(frozen=True)
class Case:
    """One call of a kernel with one tile."""

    generation: str
    dtype: str
    tile: Any

    module: ClassVar[Any]

    @property
    def element_bytes(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @classmethod
    def sample(cls, rng: random.Random, generation: str, dtype: str) -> "Case":
        """Any call; whether it `is_sensible` is not known yet."""
        raise NotImplementedError

    def is_sensible(self) -> bool:
        """Whether registers hold its tile."""
        return True

    def foreseen_bytes(self) -> int:
        raise NotImplementedError

    def launch(self) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Attention(Case):
    ranks: tuple[int, ...]  # of q, k and v
    head_dims: tuple[int, int]
    absorbed: tuple[bool, ...]
    mask: str
    is_causal: bool
    rows: int
    biased: bool
    tables: str = ""  # of a query that is turned: their dtype
    normed: bool = False  # and normalised before
    is_windowed: bool = False
    module = attention

    @classmethod
    def sample(cls, rng, generation, dtype):
        head_dim = rng.choice((32, 64, 64, 80, 128, 256))
        head_dims = (head_dim, rng.choice((head_dim, head_dim, 64)))
        one = any_rank(rng, 256)
        ranks = [one] * 3 if rng.random() < 0.6 else [any_rank(rng, 256) for _ in "qkv"]
        absorbed = (True, True, True)
        if rng.random() < 0.3:
            absorbed = tuple(rng.random() < 0.6 for _ in "qkv")
        q, k, v = absorbed
        if not k and not q:
            ranks[0] = ranks[1] = head_dims[0]
        elif not k:
            ranks[1] = head_dims[0]
        elif not q:
            ranks[0] = head_dims[0]
        if not v:
            ranks[2] = head_dims[1]
        return cls(
            generation, dtype, any_tile(rng, listed("attention"), described=generation == "sm_90"),
            tuple(ranks), head_dims, absorbed,
            rng.choice(("none", "none", "scanned", "rows", "added")), rng.random() < 0.4,
            rng.choice((200, 512, 1024)), rng.random() < 0.5,
            rng.choice((dtype, "float32")) if q and not k and rng.random() < 0.8 else "",
            rng.random() < 0.5,
            rng.random() < 0.2,
        )  # fmt: skip

    @property
    def extents(self) -> attention_extents.AttentionExtents:
        q_lifted, k_lifted, v_lifted = self.absorbed
        return attention_extents.AttentionExtents(
            *self.head_dims, *self.ranks, q_lifted, v_lifted, self.element_bytes, k_lifted,
            is_float16=self.dtype == "float16", mask=self.mask,
            is_causal=self.is_causal or self.is_windowed,
            keys_multiple=attention_extents.power_of_two_in(self.rows), generation=self.generation,
            table_bytes=getattr(torch, self.tables).itemsize if self.tables else 0,
            is_normed=self.normed,
        )  # fmt: skip

    def is_sensible(self):
        return attention_tiles.can_run(self.tile, self.extents, sys.maxsize)

    def foreseen_bytes(self):
        return attention_tiles.sram_bytes_of(self.tile, self.extents)

    def launch(self):
        (rank_q, rank_k, rank_v), (head_dim, head_dim_v) = self.ranks, self.head_dims
        rows, dtype = self.rows, self.dtype
        q, k, v = (empty(1, rows, 2, r, dtype=dtype).transpose(1, 2) for r in self.ranks)
        masks = {
            "none": None,
            "scanned": empty(1, 1, 1, rows, dtype="bool"),
            "rows": empty(1, 1, rows, rows, dtype="bool"),
            "added": empty(1, 1, rows, rows, dtype="float32"),
        }
        has_q, has_k, has_v = self.absorbed
        factors = {
            "q_factor": empty(2, head_dim, rank_q, dtype=dtype) if has_q else None,
            "k_factor": empty(2, head_dim, rank_k, dtype=dtype) if has_k else None,
            "v_factor": empty(2, head_dim_v, rank_v, dtype=dtype) if has_v else None,
        }
        if self.biased:  # dense operands have their biases inside
            factors["q_bias"] = empty(2, head_dim, dtype=dtype) if has_q else None
            factors["v_bias"] = empty(2, head_dim_v, dtype=dtype) if has_v else None
        turned: dict[str, Any] = {}
        if self.tables:
            turned = {name: empty(1, rows, head_dim, dtype=self.tables) for name in ("cos", "sin")}
            turned |= {"rotary_dim": head_dim, "rotary_pair": head_dim // 2}
            if self.normed:
                turned |= {"q_norm": empty(head_dim, dtype=dtype), "q_norm_eps": 1e-6}
        of = AttentionOperands(
            q, k, v, num_heads=2, scale=0.1, is_causal=self.is_causal, mask=masks[self.mask],
            behind=100 if self.is_windowed else None, **factors, **turned,
        )  # fmt: skip
        attention.rank_space_attention(of, tile=self.tile)


@dataclass(frozen=True)
class FeedForward(Case):
    ranks: tuple[Any, ...]  # of up, gate (None without one) and down
    width: int
    rows: int
    biased: bool
    activation: str
    module = feed_forward

    @classmethod
    def sample(cls, rng, generation, dtype):
        ranks: list[int | None] = [any_rank(rng, 512)] * 3
        if rng.random() < 0.5:
            ranks = [any_rank(rng, 300) for _ in range(3)]
        if rng.random() < 0.5:
            ranks[1] = None
        tile = any_tile(rng, listed("feed_forward"))
        return cls(
            generation, dtype, tile, tuple(ranks), rng.choice((400, 3072)),
            rng.choice((200, 512)), rng.random() < 0.5, rng.choice(sorted(ACTIVATIONS)),
        )  # fmt: skip

    @property
    def shape(self) -> dict[str, Any]:
        up, gate, down = self.ranks
        return {"rank_up": up, "rank_gate": gate, "rank_down": down,
                "element_bytes": self.element_bytes}  # fmt: skip

    def is_sensible(self):
        return feed_forward_tiles.can_run(
            self.tile, **self.shape, intermediate_size=self.width, sram_bytes=sys.maxsize,
            generation=self.generation,
        )  # fmt: skip

    def foreseen_bytes(self):
        return feed_forward_tiles.sram_bytes_of(
            self.tile, **self.shape, intermediate_size=self.width, generation=self.generation
        )

    def launch(self):
        (up, gate, down), width, dtype = self.ranks, self.width, self.dtype
        given: dict[str, Any] = {}
        if gate is not None:
            given["gate"] = empty(self.rows, gate, dtype=dtype)
            given["gate_factor"] = empty(width, gate, dtype=dtype)
        if self.biased:
            given["up_bias"] = empty(width, dtype=dtype)
            given["down_bias"] = empty(down, dtype=dtype)
        of = FeedForwardOperands(
            empty(self.rows, up, dtype=dtype), empty(width, up, dtype=dtype),
            empty(down, width, dtype=dtype), activation=self.activation, **given,
        )  # fmt: skip
        feed_forward.streamed_feed_forward(of, tile=self.tile)


@dataclass(frozen=True)
class WholeFeedForward(Case):
    ranks: tuple[Any, ...]  # of up, gate (None without one) and down
    gate_from: str
    widths: tuple[int, int, int]
    rows: int
    biased: bool
    activation: str
    module = feed_forward_whole

    @classmethod
    def sample(cls, rng, generation, dtype):
        of = feed_forward_whole_tiles
        gate_from = rng.choice(("none", "none", "latent", "x", "own"))
        ranks: list[int | None] = [any_rank(rng, 256)] * 3
        if rng.random() < 0.5:
            ranks = [any_rank(rng, 256) for _ in range(3)]
        if gate_from == "none":
            ranks[1] = None
        elif gate_from == "latent":
            ranks[1] = ranks[0]
        tile = any_tile(rng, (*of.TILES_WIDE, *of.TILES_32_BIT))
        tile = replace(tile, block_k=rng.choice((tile.block_k, 32, 64)))
        return cls(
            generation, dtype, tile, tuple(ranks), gate_from,
            tuple(rng.choice((x, x, 400)) for x in (768, 3072, 768)),
            rng.choice((200, 512)), rng.random() < 0.5, rng.choice(sorted(ACTIVATIONS)),
        )  # fmt: skip

    @property
    def extents(self) -> feed_forward_whole_tiles.WholeExtents:
        return feed_forward_whole_tiles.WholeExtents(
            *self.ranks, self.widths[1], self.gate_from, self.element_bytes, self.generation
        )

    def is_sensible(self):
        of = feed_forward_whole_tiles
        limit = of.MAX_REGISTERS_16_BIT if self.element_bytes == 2 else of.MAX_REGISTERS_32_BIT
        return of.registers_of(self.tile, self.extents) <= limit

    def foreseen_bytes(self):
        return feed_forward_whole_tiles.sram_bytes_of(self.tile, self.extents)

    def launch(self):
        (up, gate, down), (hidden, width, out), dtype = self.ranks, self.widths, self.dtype
        given: dict[str, Any] = {}
        if gate is not None:
            given["gate_v"] = empty(width, gate, dtype=dtype)
        if self.gate_from in ("x", "own"):
            given["gate_u"] = empty(gate, hidden, dtype=dtype)
        if self.gate_from == "own":
            given["gate_x"] = empty(self.rows, hidden, dtype=dtype)
        if self.biased:
            given["up_bias"] = empty(width, dtype=dtype)
            given["down_latent_bias"] = empty(down, dtype=dtype)
            given["down_bias"] = empty(out, dtype=dtype)
        of = WholeFeedForwardOperands(
            empty(self.rows, hidden, dtype=dtype), empty(up, hidden, dtype=dtype),
            empty(width, up, dtype=dtype), empty(down, width, dtype=dtype),
            empty(out, down, dtype=dtype), activation=self.activation, **given,
        )  # fmt: skip
        feed_forward_whole.streamed_whole_feed_forward(of, tile=self.tile)


@dataclass(frozen=True)
class Chain(Case):
    rank: int
    widths: tuple[int, int]
    rows: int
    biased: bool
    module = chain

    @classmethod
    def sample(cls, rng, generation, dtype):
        rows = rng.choice((1, 200, 4096, 65536))
        rank, widths = any_rank(rng, 256), tuple(rng.choice((768, 400, 1000)) for _ in "xy")
        tile = any_tile(rng, chain_tiles.tiles_for(rows))
        tile = chain_tiles.shared_out(tile, rows, widths[1], 132)
        return cls(generation, dtype, tile, rank, widths, rows, rng.random() < 0.5)

    def is_sensible(self):
        of = chain_tiles
        limit = of.MAX_REGISTERS_16_BIT if self.element_bytes == 2 else of.MAX_REGISTERS_32_BIT
        registers = of.registers_of(self.tile, rank=self.rank, element_bytes=self.element_bytes)
        return registers <= limit

    def foreseen_bytes(self):
        return chain_tiles.sram_bytes_of(
            self.tile, rank=self.rank, element_bytes=self.element_bytes, generation=self.generation
        )

    def launch(self):
        (hidden, out), dtype = self.widths, self.dtype
        of = ChainOperands(
            empty(self.rows, hidden, dtype=dtype), empty(self.rank, hidden, dtype=dtype),
            empty(out, self.rank, dtype=dtype),
            bias=empty(out, dtype=dtype) if self.biased else None,
        )  # fmt: skip
        chain.streamed_chain(of, tile=self.tile)


@dataclass(frozen=True)
class Siblings(Case):
    widths: tuple[int, ...]
    features: int
    rows: int
    biased: bool
    module = siblings

    @classmethod
    def sample(cls, rng, generation, dtype):
        rows, of = rng.choice((1, 16, 200, 4096)), siblings_tiles
        tile = any_tile(rng, (*of.TILES, *of.TILES_FEW_ROWS, *of.TILES_32_BIT))
        widths = (any_rank(rng, 1500),) * rng.choice((2, 3))
        return cls(
            generation, dtype, tile, widths, rng.choice((768, 1000, 4096)), rows,
            rng.random() < 0.5,
        )  # fmt: skip

    def is_sensible(self):
        return self.element_bytes == 2 or self.tile in siblings_tiles.TILES_32_BIT

    def foreseen_bytes(self):
        return siblings_tiles.sram_bytes_of(self.tile, self.element_bytes, self.generation)

    def launch(self):
        weights = [empty(width, self.features, dtype=self.dtype) for width in self.widths]
        biases = [empty(width, dtype=self.dtype) if self.biased else None for width in self.widths]
        x = empty(self.rows, self.features, dtype=self.dtype)
        siblings.sibling_linears(SiblingOperands(x, tuple(weights), tuple(biases)), tile=self.tile)


@dataclass(frozen=True)
class LiftedActivation(Case):
    ranks: tuple[int, int | None]
    width: int
    rows: int
    biased: bool
    activation: str
    module = lifted_activation

    @classmethod
    def sample(cls, rng, generation, dtype):
        of = lifted_activation_tiles
        tile = any_tile(rng, (of.TILE, TileConfig(128, 256, 8, 4)))
        ranks = (rng.randint(2, 128) * 8, rng.choice((None, rng.randint(2, 128) * 8)))
        return cls(
            "sm_90", rng.choice(("bfloat16", "float16")), tile, ranks, rng.choice((400, 3072)),
            rng.choice((200, 512)), rng.random() < 0.5, rng.choice(sorted(ACTIVATIONS)),
        )  # fmt: skip

    def foreseen_bytes(self):
        return lifted_activation_tiles.sram_bytes_of(self.tile, [r for r in self.ranks if r])

    def launch(self):
        (up, gate), width, rows, dtype = self.ranks, self.width, self.rows, self.dtype
        bias = empty(width, dtype=dtype) if self.biased else None
        gated: tuple[Tensor | None, ...] = (None, None, None)
        if gate is not None:
            gated = empty(rows, gate, dtype=dtype), empty(width, gate, dtype=dtype), bias
        lifted_activation.lift_and_activate(
            empty(rows, width, dtype=dtype), empty(rows, up, dtype=dtype),
            empty(width, up, dtype=dtype), bias, *gated, self.activation, tile=self.tile,
        )  # fmt: skip


CASES: dict[str, type[Case]] = {
    "attention": Attention,
    "feed_forward": FeedForward,
    "feed_forward_whole": WholeFeedForward,
    "chain": Chain,
    "siblings": Siblings,
    "lifted_activation": LiftedActivation,
}


def sampled(kernel: str, count: int, seed: int, generation: str | None = None) -> Iterator[Case]:
    """``count`` different sensible calls."""
    rng = random.Random(f"{kernel} {seed}")
    seen: set[Case] = set()
    while len(seen) < count:
        case = CASES[kernel].sample(rng, generation or pick(rng, GENERATIONS), pick(rng, DTYPES))
        if case not in seen and case.is_sensible():
            seen.add(case)
            yield case
