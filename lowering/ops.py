"""The operators that rewritten graphs call: schemas, shapes, gradients, and who runs them where.

On CUDA the Triton kernels run, elsewhere the same mathematics on library operators; both take
the operands that the graph names, so one rewritten graph serves every device. The compiler that
follows sees a Triton kernel's launch as a node of its own; what runs on library operators stays
opaque to it. A gradient recomputes the plain expression, and so has gradients itself.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from flashsvd_compile.kernels.attention_blocks import (
    BlockedAttention,
    LatentSource,
    blocked_attention,
)
from flashsvd_compile.kernels.attention_library import rank_space_attention_library
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.attention_recomputed import recomputed_attention
from flashsvd_compile.kernels.attention_reference import lifted_attention
from flashsvd_compile.kernels.chain_operands import ChainOperands, unfused_chain
from flashsvd_compile.kernels.chain_tiles import ChainTile
from flashsvd_compile.kernels.feed_forward_blocks import (
    are_lifted_at_once,
    one_block_feed_forward,
    row_blocks_feed_forward,
)
from flashsvd_compile.kernels.feed_forward_operands import FeedForwardOperands
from flashsvd_compile.kernels.feed_forward_reference import unfused_feed_forward
from flashsvd_compile.kernels.feed_forward_whole_operands import WholeFeedForwardOperands
from flashsvd_compile.kernels.feed_forward_whole_reference import unfused_whole_feed_forward
from flashsvd_compile.kernels.feed_forward_whole_tiles import WholeTile
from flashsvd_compile.kernels.siblings_operands import SiblingOperands, separate_linears
from flashsvd_compile.kernels.siblings_tiles import MatmulTile
from flashsvd_compile.kernels.tiles import TileConfig
from flashsvd_compile.lowering.tiled import TILED, Cut, TiledOperator
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true

_LIBRARY = torch.library.Library("flashsvd", "FRAGMENT")

# ``k_bias`` changes no result but under a soft-cap or beside a sink, as it adds one constant to all
# scores of a query: else it is named only so that training finds its gradient, which is zero, where
# the model's own graph would.
_ATTENTION_TENSORS = (
    "q", "k", "v", "q_factor", "q_bias", "k_factor", "v_factor", "v_bias", "mask", "k_bias",
    "sink", "cos", "sin", "q_norm",
)  # fmt: skip
# ``q``, ``k`` and ``v`` are x where there is a factor that makes the latent of it, ``q_u``.
_ATTENTION_BLOCKS_TENSORS = (
    "q", "k", "v", "q_factor", "q_bias", "k_factor", "v_factor", "v_bias", "mask",
    "q_u", "q_latent_bias", "k_u", "k_latent_bias", "v_u", "v_latent_bias", "k_bias", "sink",
    "cos", "sin", "q_norm",
)  # fmt: skip
_FEED_FORWARD_TENSORS = (
    "up", "up_factor", "down_factor", "up_bias", "gate", "gate_factor", "gate_bias", "down_bias",
)  # fmt: skip

_WHOLE_TENSORS = (
    "x", "up_u", "up_v", "down_u", "down_v", "up_latent_bias", "up_bias",
    "gate_x", "gate_u", "gate_v", "gate_latent_bias", "gate_bias", "down_latent_bias", "down_bias",
)  # fmt: skip
_CHAIN_TENSORS = ("x", "u", "v", "latent_bias", "bias")


def _schema(tensors: Sequence[str], rest: str, required_tensors: int = 3) -> str:
    """The first tensors are required, the others optional; numbers go by keyword."""
    required = ", ".join(f"Tensor {name}" for name in tensors[:required_tensors])
    optional = ", ".join(f"Tensor? {name}=None" for name in tensors[required_tensors:])
    return f"({required}, {optional}, *, {rest}) -> Tensor"


# ``tile``: the fields of the kernel's TileConfig; empty lets the launcher choose, or, for row
# blocks, says that library matmuls lift. ``sram_budget``: bytes of shared memory a block for the
# launcher to choose by; 0 for what the device has. ``softcap``, ``rotary_dim`` and ``q_norm_eps``:
# 0 for none; ``ahead``, ``behind``: see `AttentionOperands`.
_LIBRARY.define(
    "rank_space_attention"
    + _schema(
        _ATTENTION_TENSORS,
        "int num_heads, bool is_causal, float scale, int[] tile, int sram_budget=0, "
        "float softcap=0.0, int rotary_dim=0, int rotary_pair=0, float q_norm_eps=0.0, "
        "SymInt ahead=0, SymInt? behind=None",
    )
)
# ``heads``: of q, k and v, where x does not tell.
_LIBRARY.define(
    "rank_space_attention_blocks"
    + _schema(
        _ATTENTION_BLOCKS_TENSORS,
        "int num_heads, bool is_causal, float scale, int[] heads, int block_batch, "
        "int block_heads, int[] tile, int sram_budget=0, float softcap=0.0, int rotary_dim=0, "
        "int rotary_pair=0, float q_norm_eps=0.0, SymInt ahead=0, SymInt? behind=None",
    )
)
_LIBRARY.define(
    "streamed_feed_forward" + _schema(_FEED_FORWARD_TENSORS, "str activation, int[] tile")
)
_LIBRARY.define(
    "row_blocks_feed_forward"
    + _schema(_FEED_FORWARD_TENSORS, "str activation, int block_rows, int[] tile=[]")
)
_LIBRARY.define(
    "streamed_whole_feed_forward" + _schema(_WHOLE_TENSORS, "str activation, int[] tile", 5)
)
_LIBRARY.define("streamed_chain" + _schema(_CHAIN_TENSORS, "int[] tile"))
# ``biased`` names the siblings that have a bias: autograd follows no list that holds Nones.
_LIBRARY.define(
    "sibling_linears(Tensor x, Tensor[] weights, Tensor[] biases, *, int[] biased, int[] tile) "
    "-> Tensor[]"
)

rank_space_attention = torch.ops.flashsvd.rank_space_attention.default
rank_space_attention_blocks = torch.ops.flashsvd.rank_space_attention_blocks.default
streamed_feed_forward = torch.ops.flashsvd.streamed_feed_forward.default
row_blocks_feed_forward_op = torch.ops.flashsvd.row_blocks_feed_forward.default
sibling_linears = torch.ops.flashsvd.sibling_linears.default

streamed_whole_feed_forward = torch.ops.flashsvd.streamed_whole_feed_forward.default
streamed_chain = torch.ops.flashsvd.streamed_chain.default


# ---- who runs them ------------------------------------------------------------------------------


def _tile(tile: Sequence[int]) -> TileConfig | None:
    return TileConfig(*tile) if tile else None


def _attention_on_library(
    *tensors: Tensor | None, tile: Sequence[int], sram_budget: int = 0, **numbers: Any
) -> Tensor:
    del tile, sram_budget
    return rank_space_attention_library(_attention_operands(tensors, numbers))


def _attention_on_triton(
    *tensors: Tensor | None, tile: Sequence[int], sram_budget: int = 0, **numbers: Any
) -> Tensor:
    from flashsvd_compile.kernels.attention import rank_space_attention as launch

    of = _attention_operands(tensors, numbers)
    return launch(of, tile=_tile(tile), sram_budget=sram_budget)


def _attention_blocks_on_library(
    *tensors: Tensor | None, tile: Sequence[int], sram_budget: int = 0, **numbers: Any
) -> Tensor:
    del tile, sram_budget

    def attend(of: AttentionOperands, out: Tensor, place: tuple[int, int]) -> None:
        found = rank_space_attention_library(of)
        batch, head = place
        out[batch : batch + found.shape[0], head : head + found.shape[1]].copy_(found)

    return _attention_blocks(tensors, numbers, attend)


def _attention_blocks_on_triton(
    *tensors: Tensor | None, tile: Sequence[int], sram_budget: int = 0, **numbers: Any
) -> Tensor:
    from flashsvd_compile.kernels.attention import rank_space_attention as launch

    def attend(of: AttentionOperands, out: Tensor, place: tuple[int, int]) -> None:
        launch(of, tile=_tile(tile), out=out, place=place, sram_budget=sram_budget)

    return _attention_blocks(tensors, numbers, attend)


def _attention_blocks(
    tensors: Sequence[Tensor | None], numbers: dict[str, Any], attend: Callable[..., Any]
) -> Tensor:
    named = _named(_ATTENTION_BLOCKS_TENSORS, tensors)
    blocks = {name: numbers.pop(name) for name in ("block_batch", "block_heads")}
    queries, sources = named["q"], {}
    for name, heads in zip("qkv", numbers.pop("heads"), strict=True):
        u, bias = named.pop(f"{name}_u", None), named.pop(f"{name}_latent_bias", None)
        if u is not None:
            sources[name] = LatentSource(named[name], u, bias, heads)
    blocked = BlockedAttention(AttentionOperands(**named, **numbers), sources)
    return blocked_attention(blocked, attend, queries=queries, **blocks)


def _streamed_on_triton(*tensors: Tensor | None, tile: Sequence[int], **numbers: Any) -> Tensor:
    from flashsvd_compile.kernels.feed_forward import streamed_feed_forward as launch

    return launch(_feed_forward_operands(tensors, numbers), tile=_tile(tile))


def _row_blocks(
    *tensors: Tensor | None, block_rows: int, tile: Sequence[int] = (), **numbers: Any
) -> Tensor:
    of = _feed_forward_operands(tensors, numbers)
    lifting = _tile(tile) if of.up.is_cuda else None
    return row_blocks_feed_forward(of, block_rows=block_rows, tile=lifting)


def _whole_on_triton(*tensors: Tensor | None, tile: Sequence[int], **numbers: Any) -> Tensor:
    from flashsvd_compile.kernels.feed_forward_whole import streamed_whole_feed_forward as launch

    of = _whole_operands(tensors, numbers)
    return launch(of, tile=WholeTile(*tile) if tile else None)


@torch.no_grad()
def _whole_on_library(*tensors: Tensor | None, tile: Sequence[int], **numbers: Any) -> Tensor:
    del tile
    return unfused_whole_feed_forward(_whole_operands(tensors, numbers), row_blocks_feed_forward)


def _chain_on_triton(*tensors: Tensor | None, tile: Sequence[int]) -> Tensor:
    from flashsvd_compile.kernels.chain import streamed_chain as launch

    return launch(_chain_operands(tensors, {}), tile=ChainTile(*tile) if tile else None)


@torch.no_grad()
def _chain_on_library(*tensors: Tensor | None, tile: Sequence[int]) -> Tensor:
    del tile
    return unfused_chain(_chain_operands(tensors, {}))


def _siblings_on_library(*tensors: Any, biased: Sequence[int], tile: Sequence[int]) -> list[Tensor]:
    del tile
    return separate_linears(SiblingOperands.of(*tensors, biased))


def _siblings_on_triton(*tensors: Any, biased: Sequence[int], tile: Sequence[int]) -> list[Tensor]:
    from flashsvd_compile.kernels.siblings import sibling_linears as launch

    of = SiblingOperands.of(*tensors, biased)
    return launch(of, tile=MatmulTile(*tile) if tile else None)


def _attention_operands(
    tensors: Sequence[Tensor | None], numbers: dict[str, Any]
) -> AttentionOperands:
    return AttentionOperands(**_named(_ATTENTION_TENSORS, tensors), **numbers)


def _feed_forward_operands(
    tensors: Sequence[Tensor | None], numbers: dict[str, Any]
) -> FeedForwardOperands:
    return FeedForwardOperands(**_named(_FEED_FORWARD_TENSORS, tensors), **numbers)


def _whole_operands(
    tensors: Sequence[Tensor | None], numbers: dict[str, Any]
) -> WholeFeedForwardOperands:
    return WholeFeedForwardOperands(**_named(_WHOLE_TENSORS, tensors), **numbers)


def _chain_operands(tensors: Sequence[Tensor | None], numbers: dict[str, Any]) -> ChainOperands:
    return ChainOperands(**_named(_CHAIN_TENSORS, tensors), **numbers)


def _named(names: Sequence[str], tensors: Sequence[Any]) -> dict[str, Any]:
    """Arguments by name; the dispatcher leaves out trailing defaults."""
    return dict(zip(names, tensors, strict=False))


_LIBRARY.impl("rank_space_attention", _attention_on_library, "CompositeExplicitAutograd")
_LIBRARY.impl(
    "rank_space_attention_blocks", _attention_blocks_on_library, "CompositeExplicitAutograd"
)
_LIBRARY.impl("row_blocks_feed_forward", _row_blocks, "CompositeExplicitAutograd")
_LIBRARY.impl("streamed_whole_feed_forward", _whole_on_library, "CompositeExplicitAutograd")
_LIBRARY.impl("streamed_chain", _chain_on_library, "CompositeExplicitAutograd")
_LIBRARY.impl("sibling_linears", _siblings_on_library, "CompositeExplicitAutograd")


def _never(*_: Any, **__: Any) -> bool:
    return False


def _on_triton(
    name: str, launch: Callable[..., Any], is_opaque: Callable[..., bool] = _never
) -> None:
    """Run ``flashsvd::name`` by ``launch`` on CUDA, and show the compiler its kernel there."""
    _LIBRARY.impl(name, launch, "CUDA")
    _show(name, launch, is_opaque)


def _show(name: str, launch: Callable[..., Any], is_opaque: Callable[..., bool]) -> None:
    """Have the compiler see what ``launch`` calls in place of ``flashsvd::name`` on CUDA, unless
    the operator ``is_opaque`` for these arguments.

    A launch that Inductor writes itself costs 40 µs of host time in a BERT encoder, through the
    dispatcher and the launcher's Python 240 (a host beside an H100, torch 2.11, 2026-11-25):
    more than most of these kernels run.
    """

    def show(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args[0].device.type != "cuda" or is_opaque(*args, **kwargs):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return launch(*args, **kwargs)

    torch.library.register_torch_dispatch(
        f"flashsvd::{name}", FunctionalTensorMode, show, lib=_LIBRARY
    )


def _has_symbolic_batch(q: Tensor, *_: Any, **__: Any) -> bool:
    """As many blocks as it has can only be launched when it is known."""
    return not isinstance(q.shape[0], int)


def _one_block(*tensors: Tensor | None, tile: Sequence[int], **numbers: Any) -> Tensor:
    del numbers["block_rows"]
    return one_block_feed_forward(_feed_forward_operands(tensors, numbers), TileConfig(*tile))


def _is_in_pieces(
    *tensors: Tensor | None, block_rows: int, tile: Sequence[int] = (), **numbers: Any
) -> bool:
    """Blocks that are written into parts of one output: as nodes of a graph they would be copied
    there."""
    if not tile:
        return True
    of = _feed_forward_operands(tensors, numbers)
    is_one = statically_known_true(of.rows <= block_rows)
    return not is_one or not are_lifted_at_once(of)


_on_triton("rank_space_attention", _attention_on_triton)
_on_triton("rank_space_attention_blocks", _attention_blocks_on_triton, _has_symbolic_batch)
_show("row_blocks_feed_forward", _one_block, _is_in_pieces)
_on_triton("streamed_feed_forward", _streamed_on_triton)
_on_triton("streamed_whole_feed_forward", _whole_on_triton)
_on_triton("streamed_chain", _chain_on_triton)
_on_triton("sibling_linears", _siblings_on_triton)


# ---- shapes -------------------------------------------------------------------------------------


def _attention_shape(names: Sequence[str]) -> Callable[..., Tensor]:
    """Of an operator whose tensors are ``names``: rows are q's last but one dimension, whether it
    is a latent or what makes one."""

    def shape(
        q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor | None, num_heads: int, **_: Any
    ) -> Tensor:
        v_factor = _named(names[3:], tensors).get("v_factor")
        head_dim_v = v.shape[-1] if v_factor is None else v_factor.shape[1]
        return q.new_empty((q.shape[0], q.shape[-2], num_heads, head_dim_v)).transpose(1, 2)

    return shape


for _name, _tensors in (
    ("rank_space_attention", _ATTENTION_TENSORS),
    ("rank_space_attention_blocks", _ATTENTION_BLOCKS_TENSORS),
):
    torch.library.register_fake(f"flashsvd::{_name}", _attention_shape(_tensors), lib=_LIBRARY)


def _feed_forward_shape(
    up: Tensor, up_factor: Tensor, down_factor: Tensor, *_tensors: Tensor | None, **_: Any
) -> Tensor:
    return up.new_empty((up.shape[0], down_factor.shape[0]))


for _name in ("streamed_feed_forward", "row_blocks_feed_forward"):
    torch.library.register_fake(f"flashsvd::{_name}", _feed_forward_shape, lib=_LIBRARY)


@torch.library.register_fake("flashsvd::streamed_whole_feed_forward", lib=_LIBRARY)
def _whole_shape(
    x: Tensor, up_u: Tensor, up_v: Tensor, down_u: Tensor, down_v: Tensor, *_t: Any, **_: Any
) -> Tensor:
    return x.new_empty((x.shape[0], down_v.shape[0]))


@torch.library.register_fake("flashsvd::streamed_chain", lib=_LIBRARY)
def _chain_shape(x: Tensor, u: Tensor, v: Tensor, *_t: Any, **_: Any) -> Tensor:
    return x.new_empty((x.shape[0], v.shape[0]))


@torch.library.register_fake("flashsvd::sibling_linears", lib=_LIBRARY)
def _siblings_shape(
    x: Tensor, weights: Sequence[Tensor], _biases: Sequence[Tensor], **_: Any
) -> list[Tensor]:
    return [x.new_empty((x.shape[0], weight.shape[0])) for weight in weights]


# ---- gradients ----------------------------------------------------------------------------------


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """On the device of ``tensor``."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _leaf(tensor: Tensor, needed: bool, again: bool) -> Tensor:
    """What stands for ``tensor`` where its gradient is computed anew: a leaf, or, where that is to
    have a gradient ``again``, a view, through which that finds the tensor itself."""
    return tensor.view_as(tensor) if again else tensor.detach().requires_grad_(needed)


def _differentiable(name: str, plain: Callable[[Any], Tensor], record: Callable[..., Any],
                    numbers: Sequence[str]) -> None:  # fmt: skip
    """Register the gradient of ``flashsvd::name``: that of ``plain`` over the same operands.

    ``record`` makes of tensors and numbers what ``plain`` takes.
    """

    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
    ) -> None:
        ctx.save_for_backward(*inputs)
        ctx.numbers = {key: keyword_only_inputs[key] for key in numbers}

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # ``wanted`` ends where the caller's arguments did: the rest of ``saved`` are Nones.
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad
        again = torch.is_grad_enabled()  # whether this gradient is to have one of its own
        # Autocast has had its say on the operands: what surrounds a backward shall have none.
        with torch.enable_grad(), _without_autocast(grad):
            leaves = [
                None if tensor is None else _leaf(tensor, needed, again)
                for tensor, needed in zip(saved, wanted, strict=False)
            ]
            output = plain(record(leaves, ctx.numbers))
            asked = [
                leaf
                for leaf, needed in zip(leaves, wanted, strict=False)
                if leaf is not None and needed
            ]
            found = iter(
                torch.autograd.grad(output, asked, grad, create_graph=again, materialize_grads=True)
            )
        return tuple(next(found) if needed else None for needed in wanted)

    torch.library.register_autograd(
        f"flashsvd::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )


_differentiable(
    "rank_space_attention", recomputed_attention, _attention_operands,
    (
        "num_heads", "is_causal", "scale", "softcap", "rotary_dim", "rotary_pair", "q_norm_eps",
        "ahead", "behind",
    ),
)  # fmt: skip
for _name in ("streamed_feed_forward", "row_blocks_feed_forward"):
    _differentiable(_name, unfused_feed_forward, _feed_forward_operands, ("activation",))
_differentiable(
    "streamed_whole_feed_forward", unfused_whole_feed_forward, _whole_operands, ("activation",)
)
_differentiable("streamed_chain", unfused_chain, _chain_operands, ())


def _keep_siblings(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    x, weights, _ = inputs
    ctx.save_for_backward(x, *weights)
    ctx.biased = keyword_only_inputs["biased"]


def _siblings_backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    """Σ G_i U_i for x, G_iᵀ x for each weight, Σ G_i over rows for each bias."""
    x, *weights = ctx.saved_tensors
    x_wanted, weights_wanted, biases_wanted = ctx.needs_input_grad
    grad_x = None
    with _without_autocast(x):
        if x_wanted:
            grad_x = grads[0] @ weights[0]
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                grad_x = torch.addmm(grad_x, grad, weight)
        of_weights = [
            grad.t() @ x if wanted else None
            for grad, wanted in zip(grads, weights_wanted, strict=True)
        ]
    of_biases = [
        grads[index].sum(0) if wanted else None
        for index, wanted in zip(ctx.biased, biases_wanted, strict=True)
    ]
    return grad_x, of_weights, of_biases


torch.library.register_autograd(
    "flashsvd::sibling_linears", _siblings_backward, setup_context=_keep_siblings, lib=_LIBRARY
)


# ---- operators with a tile ----------------------------------------------------------------------

TILED["rank_space_attention"] = TiledOperator(
    _ATTENTION_TENSORS,
    lambda tensors, numbers: lifted_attention(
        _attention_operands(tensors, {k: v for k, v in numbers.items() if k != "sram_budget"})
    ),
    # of the output's batch and queries
    cuts=(
        Cut(0, {"q": 0, "k": 0, "v": 0, "mask": 0, "cos": 0, "sin": 0}, 1),
        Cut(2, {"q": 2, "mask": 2, "cos": 1, "sin": 1}, 128),
    ),
    sizes={"q": 3, "k": 3, "v": 3, "mask": 4, "cos": 2, "sin": 2},
)
TILED["streamed_feed_forward"] = TiledOperator(
    _FEED_FORWARD_TENSORS,
    lambda tensors, numbers: unfused_feed_forward(_feed_forward_operands(tensors, numbers)),
    cuts=(Cut(0, {"up": 0, "gate": 0}, 512),),
    sizes={"up": 1, "gate": 1},
)
