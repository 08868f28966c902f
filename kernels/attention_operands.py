"""The operands of rank-space attention: what the three implementations agree on.

    q̃      = (P_q V_qᵀ + b_q) V_k          scores = scale · q̃ P_kᵀ + mask
    output = (softmax(scores) P_v) V_vᵀ + b_v

and, with a ``softcap`` c or a ``sink`` t of each head,

    scores  = c · tanh(scale · (q̃ P_kᵀ + q b_k) / c) + mask
    weights = exp(scores) / (Σ exp(scores) + exp(t))
    output  = (weights P_v) V_vᵀ + (Σ weights) b_v

and, with ``cos`` and ``sin``, the lifted query P_q V_qᵀ + b_q turned (``rotation.py``), for dense
keys that the model has turned itself. Before that it is normalised (``head_norm.py``) where
``q_norm_eps`` is not 0.

=============  ======================  ============================================
operand        shape                   meaning
=============  ======================  ============================================
``q``          [B, H_q, M, R_q]        latent P_q, or dense queries (R_q = D)
``k``          [B, H_k, N, R_k]        latent P_k, or dense keys (R_k = D)
``v``          [B, H_v, N, R_v]        latent P_v, or dense values (R_v = D_v)
``q_factor``   [H_fq, D, R_q]          V_q; None where ``q`` is dense
``k_factor``   [H_fk, D, R_k]          V_k; None where ``k`` is dense
``v_factor``   [H_fv, D_v, R_v]        V_v; None where ``v`` is dense
``q_bias``     [H_bq, D]               b_q
``v_bias``     [H_bv, D_v]             b_v
``k_bias``     [H_bk, D]               b_k, which only a soft-cap or a sink lets count
``sink``       [H_t]                   t, floating; None: nothing beside the keys is attended to
``cos``        [B|1, M|1, T]           of RoPE, floating, T: ``rotary_dim`` or half of that
``sin``        [B|1, M|1, T]           the same
``q_norm``     [D]                     of an RMSNorm ahead of that, floating; None: all ones
``mask``       [B|1, H|1, M|1, N|1]    bool (True attends), or floating and added
output         [B, H, M, D_v]          a view of memory laid out [B, M, H, D_v]
=============  ======================  ============================================

Each operand's own number of heads divides H = ``num_heads``: head h reads its head
h // (H // H_x), so that 1 is shared by all and the groups of GQA need no copy. The bias of k
adds one constant to all scores of a query, which softmax drops: but not from within tanh, nor
beside a sink, which it does not shift. With ``is_causal`` query m sees key n iff n <= m +
``ahead``, with ``behind`` iff n >= m - ``behind``, and the mask, if any, counts as well. A query
that sees no key gives exactly zero, without b_v. Strides are free, 0 among them: nothing is
expanded to be read.
"""

import math
from dataclasses import KW_ONLY, dataclass
from functools import cached_property

import torch
from flashsvd_compile.kernels.rotation import check_rotation
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


@dataclass(frozen=True)
class AttentionShape:
    """Extents of one call, by the letters of the table above."""

    batch: int
    num_heads: int
    queries: int
    keys: int
    head_dim_qk: int
    head_dim_v: int
    rank_q: int
    rank_k: int
    rank_v: int


@dataclass(frozen=True)
class AttentionOperands:
    """One call's operands, by the table above.

    ``shape`` holds its extents, and asks for them: a ValueError names the first operand that does
    not fit the others.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    _: KW_ONLY
    num_heads: int
    scale: float
    q_factor: Tensor | None = None
    q_bias: Tensor | None = None
    k_factor: Tensor | None = None
    v_factor: Tensor | None = None
    v_bias: Tensor | None = None
    k_bias: Tensor | None = None
    sink: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    q_norm: Tensor | None = None
    mask: Tensor | None = None
    is_causal: bool = False
    ahead: int = 0
    behind: int | None = None
    softcap: float = 0.0
    rotary_dim: int = 0
    rotary_pair: int = 0
    q_norm_eps: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether softmax over scaled and masked scores is all there is: no soft-cap, no sink."""
        return self.softcap == 0 and self.sink is None

    @property
    def is_shifted(self) -> bool:
        """Whether the last key that a query sees is not known to be that of its own number."""
        return self.is_causal and not statically_known_true(self.ahead == 0)

    @property
    def is_banded(self) -> bool:
        """Whether a query's place bounds what it sees otherwise than SDPA's ``is_causal`` does."""
        return self.is_shifted or self.behind is not None

    @property
    def is_rotated(self) -> bool:
        """Whether lifted queries are turned."""
        return self.rotary_dim > 0

    @property
    def table_bytes(self) -> int:
        """Of an entry of the wider table, 0 where there is none."""
        return max((t.element_size() for t in (self.cos, self.sin) if t is not None), default=0)

    @property
    def counted_k_bias(self) -> Tensor | None:
        """b_k where it changes the result."""
        return None if self.is_plain else self.k_bias

    @cached_property
    def shape(self) -> AttentionShape:
        q, k, v, num_heads = self.q, self.k, self.v, self.num_heads
        latents = {"q": q, "k": k, "v": v}
        for name, latent in latents.items():
            if latent.dim() != 4:
                raise ValueError(
                    f"{name} must be [batch, heads, rows, rank], got {list(latent.shape)}"
                )
        batch, _, queries, rank_q = q.shape
        keys, rank_k, rank_v = k.shape[2], k.shape[3], v.shape[3]
        head_dim_qk = rank_q if self.q_factor is None else self.q_factor.shape[-2]
        head_dim_v = rank_v if self.v_factor is None else self.v_factor.shape[-2]

        _check("k", k, (batch, None, keys, rank_k if self.k_factor is not None else head_dim_qk))
        _check("v", v, (batch, None, keys, rank_v))
        operands = {
            "q_factor": (self.q_factor, (None, head_dim_qk, rank_q)),
            "k_factor": (self.k_factor, (None, head_dim_qk, rank_k)),
            "v_factor": (self.v_factor, (None, head_dim_v, rank_v)),
            "q_bias": (self.q_bias, (None, head_dim_qk)),
            "v_bias": (self.v_bias, (None, head_dim_v)),
            "k_bias": (self.k_bias, (None, head_dim_qk)),
        }
        for name, (operand, expected) in operands.items():
            if operand is not None:
                _check(name, operand, expected)

        given = latents | {name: x for name, (x, _) in operands.items() if x is not None}
        for name, operand in given.items():
            heads = operand.shape[1 if name in latents else 0]
            if heads < 1 or num_heads % heads != 0:
                raise ValueError(
                    f"{name} has {heads} heads, which must divide num_heads {num_heads}"
                )
            if operand.dtype != q.dtype or operand.device != q.device:
                raise ValueError(
                    f"{name} is {operand.dtype} on {operand.device}, q is {q.dtype} on {q.device}: "
                    "all operands but the mask, the sink and tables must share both"
                )
        if not self.is_causal and not statically_known_true(self.ahead == 0):
            raise ValueError(f"ahead {self.ahead} counts only where is_causal")
        if not 0 <= self.softcap < math.inf:
            raise ValueError(f"softcap must be 0 (none) or positive, got {self.softcap}")
        if self.sink is not None:
            _check_sink(self.sink, num_heads, q.device)
        rows = (batch, queries, head_dim_qk)
        check_rotation(self.cos, self.sin, self.rotary_dim, self.rotary_pair, rows)
        if self.is_rotated and (self.q_factor is None or self.k_factor is not None):
            raise ValueError("only lifted queries are turned, and for dense keys")
        self._check_norm(head_dim_qk)
        if self.mask is not None:
            _check_mask(self.mask, (batch, num_heads, queries, keys), q.device)
        return AttentionShape(
            batch, num_heads, queries, keys, head_dim_qk, head_dim_v, rank_q, rank_k, rank_v
        )

    def _check_norm(self, head_dim: int) -> None:
        if not self.q_norm_eps and self.q_norm is None:
            return
        if not 0 < self.q_norm_eps < math.inf or not self.is_rotated:
            raise ValueError("only queries that turn are normalised, with a positive q_norm_eps")
        if self.q_norm is not None:
            _check("q_norm", self.q_norm, (head_dim,))
            if not self.q_norm.dtype.is_floating_point:
                raise ValueError(f"q_norm must be floating, got {self.q_norm.dtype}")


def _check(name: str, operand: Tensor, expected: tuple[int | None, ...]) -> None:
    """``None`` in ``expected`` leaves a dimension (the heads) to be checked by its own rule."""
    fits = operand.dim() == len(expected) and all(
        want is None or have == want for have, want in zip(operand.shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("heads" if want is None else str(want) for want in expected)
        raise ValueError(f"{name} must be [{wanted}], got {list(operand.shape)}")


def _check_sink(sink: Tensor, num_heads: int, device: torch.device) -> None:
    if sink.dim() != 1 or sink.shape[0] < 1 or num_heads % sink.shape[0]:
        raise ValueError(
            f"sink must be [heads], a divisor of num_heads {num_heads}, got {list(sink.shape)}"
        )
    if not sink.dtype.is_floating_point or sink.device != device:
        raise ValueError(f"sink must be floating and on {device}, got {sink.dtype}, {sink.device}")


def _check_mask(mask: Tensor, full: tuple[int, ...], device: torch.device) -> None:
    fits = mask.dim() == 4 and all(
        have == 1 or have == want for have, want in zip(mask.shape, full, strict=True)
    )
    if not fits:
        raise ValueError(
            f"mask must be 4-D, each dimension 1 or that of {list(full)}, got {list(mask.shape)}"
        )
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(f"mask must be bool or floating, got {mask.dtype}")
    if mask.device != device:
        raise ValueError(f"mask is on {mask.device}, q on {device}")
