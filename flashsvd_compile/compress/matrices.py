"""A linear layer's weight as the matrices that are factored, and the module of their factors."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from flashsvd_compile.compress.heads import HeadLayout
from flashsvd_compile.compress.linears import Linear
from flashsvd_compile.compress.modules import (
    FusedPerHeadLowRankLinear,
    LowRankLinear,
    PerHeadLowRankLinear,
)
from flashsvd_compile.compress.report import Kind
from flashsvd_compile.compress.svd import svd_dtype

Made = TypeVar("Made", bound=nn.Module)
LowRank = LowRankLinear | PerHeadLowRankLinear | FusedPerHeadLowRankLinear


@dataclass(frozen=True)
class Matrices:
    """A weight as the matrices that are factored each on its own."""

    linear: Linear
    weight: Tensor
    layout: HeadLayout | None

    @property
    def lead(self) -> tuple[int, ...]:
        """What the matrices are counted by."""
        if self.layout is None:
            return ()
        heads = (self.layout.num_heads,)
        return heads if self.layout.parts == 1 else (self.layout.parts, *heads)

    @property
    def shape(self) -> tuple[int, int]:
        """Of one."""
        out_features, in_features = self.weight.shape
        return (out_features if self.layout is None else self.layout.head_dim), in_features

    @property
    def kind(self) -> Kind:
        return "matrix" if self.layout is None else "per_head"

    @property
    def stacked(self) -> Tensor:
        """[lead.., m, n]."""
        return self.weight.detach().reshape(*self.lead, *self.shape)

    @property
    def rank_bytes(self) -> int:
        """Of one rank more in each."""
        return sum(self.shape) * (self.linear.weight_bytes // (self.shape[0] * self.shape[1]))

    def is_smaller(self, rank: int) -> bool:
        m, n = self.shape
        return rank * (m + n) < m * n

    def validate(self) -> None:
        if self.weight.is_meta:
            raise ValueError(
                f"{self.linear.path}: its weight is on the meta device; load the model first"
            )
        if not torch.isfinite(self.weight).all():
            raise ValueError(f"{self.linear.path}: its weight holds values that are not finite")

    @torch.no_grad()
    def module(self, u: Tensor, v: Tensor, rank: int) -> LowRank:
        """The layer's low-rank one, with all that hangs on the dense one."""
        out_features, in_features = self.weight.shape
        dense, layout = self.linear.module, self.layout
        module: LowRank
        with torch.device("meta"):  # no memory: the parameters are put in place below
            if layout is None:
                module = LowRankLinear(in_features, out_features, rank, bias=False)
            elif layout.parts == 1:
                module = PerHeadLowRankLinear(
                    in_features, layout.num_heads, layout.head_dim, rank, bias=False
                )
            else:
                module = FusedPerHeadLowRankLinear(
                    in_features, layout.parts, layout.num_heads, layout.head_dim, rank, bias=False
                )
        dtype, trains = self.weight.dtype, self.weight.requires_grad
        module.u = nn.Parameter(u.to(dtype).contiguous(), requires_grad=trains)
        module.v = nn.Parameter(v.to(dtype).contiguous(), requires_grad=trains)
        # The same object, so that a tied bias stays tied.
        module.bias = dense._parameters.get("bias")
        return inherit(module, dense)

    @torch.no_grad()
    def error_of(self, factors: LowRank) -> float:
        """‖W − V U‖ / ‖W‖, 0 for a weight of zeros."""
        precise = self.weight.to(svd_dtype(self.weight))
        product = factors.v.to(precise.dtype) @ factors.u.to(precise.dtype)
        norm = torch.linalg.vector_norm(precise)
        gap = torch.linalg.vector_norm(precise - product.reshape(self.weight.shape))
        return float(gap / norm) if norm > 0 else 0.0


def inherit(module: Made, dense: nn.Module) -> Made:
    """``module`` with what hangs on ``dense``, whose place it takes: the training flag, the hooks
    (their dicts, so that handles still remove them) and whatever others have put there."""
    state = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    vars(module).update({k: v for k, v in vars(dense).items() if k not in state})
    return module
