"""What rank-space attention scores keys with, before it meets them: the query, lifted and turned.

Notation as in ``attention_kernel.py``. Of RoPE (``rotation.py``) a tile has a partner for each of
its columns, which a second product lifts: its factor's rows are read in that order. So nothing is
moved between threads, and what is turned is the query as it was rounded, in float32.
"""

import triton
import triton.language as tl
from flashsvd_compile.kernels.primitives import dot
from flashsvd_compile.kernels.tile_loads import load_bias, load_tile


@triton.jit
def lifted_query(
    q,
    q_factor,
    q_bias,
    queries,
    columns,
    stride_qm,
    stride_qr,
    stride_qfd,
    stride_qfr,
    stride_qbd,
    M,
    D: tl.constexpr,
    R_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RQ: tl.constexpr,
    QUERIES_FIT: tl.constexpr,
    HAS_Q_FACTOR: tl.constexpr,
    HAS_Q_BIAS: tl.constexpr,
    ALIGNED_Q: tl.constexpr,
    ALIGNED_FQ: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``columns`` of P_q V_qᵀ + b_q (or of dense queries), float32 [BLOCK_M, BLOCK_COLUMNS]."""
    COLUMNS_FIT: tl.constexpr = D % BLOCK_COLUMNS == 0
    RANKS_FIT: tl.constexpr = R_Q % BLOCK_RQ == 0
    if HAS_Q_BIAS:  # asked for early: nothing hides its latency later
        bias = load_bias(q_bias, columns, stride_qbd, D, COLUMNS_FIT)
    if HAS_Q_FACTOR:
        lifted = tl.zeros([BLOCK_M, BLOCK_COLUMNS], tl.float32)
        for start in tl.range(0, R_Q, BLOCK_RQ, num_stages=1):
            ranks = (start + tl.arange(0, BLOCK_RQ)).to(tl.int64)
            latent = load_tile(
                q, queries[:, None], ranks[None, :], stride_qm, stride_qr,
                M, R_Q, not QUERIES_FIT, not RANKS_FIT, 1, ALIGNED_Q,
            )  # fmt: skip
            factor = load_tile(
                q_factor, ranks[:, None], columns[None, :], stride_qfr, stride_qfd,
                R_Q, D, not RANKS_FIT, not COLUMNS_FIT, ALIGNED_FQ, 1,
            )  # fmt: skip
            lifted = dot(latent, factor, lifted, PRECISION, INTERPRETED)
    else:
        lifted = load_tile(
            q, queries[:, None], columns[None, :], stride_qm, stride_qr,
            M, D, not QUERIES_FIT, not COLUMNS_FIT, 1, ALIGNED_Q,
        ).to(tl.float32)  # fmt: skip
    if HAS_Q_BIAS:
        lifted += bias[None, :]
    return lifted


@triton.jit
def _angles(
    table, queries, entries, turns, stride_m, stride_t, M, IDLE: tl.constexpr,
    QUERIES_FIT: tl.constexpr, ALL_TURN: tl.constexpr,
):  # fmt: skip
    """A table's ``entries`` [COLUMNS] for each query; IDLE for columns that do not turn."""
    pointers = table + (queries[:, None] * stride_m + entries[None, :] * stride_t)
    if QUERIES_FIT and ALL_TURN:
        found = tl.load(pointers)
    elif ALL_TURN:
        found = tl.load(pointers, mask=(queries < M)[:, None], other=IDLE)
    elif QUERIES_FIT:
        found = tl.load(pointers, mask=turns[None, :], other=IDLE)
    else:
        found = tl.load(pointers, mask=(queries < M)[:, None] & turns[None, :], other=IDLE)
    return found.to(tl.float32)


@triton.jit
def rotated_query(
    q, q_factor, q_bias, cos, sin, q_norm, queries,
    stride_qm, stride_qr, stride_qfd, stride_qfr, stride_qbd,
    stride_cm, stride_ct, stride_sm, stride_st,
    M, D: tl.constexpr, R_Q: tl.constexpr,
    ROTARY_DIM: tl.constexpr, ROTARY_PAIR: tl.constexpr, ONE_ANGLE: tl.constexpr,
    HAS_Q_NORM: tl.constexpr, NORM_EPS: tl.constexpr,
    BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_RQ: tl.constexpr,
    QUERIES_FIT: tl.constexpr, HAS_Q_BIAS: tl.constexpr,
    ALIGNED_Q: tl.constexpr, ALIGNED_FQ: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """P_q V_qᵀ + b_q with its first ROTARY_DIM columns turned, float32 [BLOCK_M, COLUMNS].

    ONE_ANGLE: tables hold an angle for each pair, else one for each column. With NORM_EPS each
    query is normalised before, HAS_Q_NORM: times a weight; its partners have the same mean square.
    """
    DTYPE: tl.constexpr = q.dtype.element_ty
    columns = tl.arange(0, COLUMNS)
    is_first = columns % (2 * ROTARY_PAIR) < ROTARY_PAIR
    turns = columns < ROTARY_DIM
    partners = tl.where(is_first, columns + ROTARY_PAIR, columns - ROTARY_PAIR)
    partners = tl.where(turns, partners, columns)
    entries = columns
    if ONE_ANGLE:
        entries = columns // (2 * ROTARY_PAIR) * ROTARY_PAIR + columns % ROTARY_PAIR
    own = lifted_query(
        q, q_factor, q_bias, queries, columns.to(tl.int64),
        stride_qm, stride_qr, stride_qfd, stride_qfr, stride_qbd,
        M, D, R_Q, BLOCK_M, COLUMNS, BLOCK_RQ, QUERIES_FIT, True, HAS_Q_BIAS,
        ALIGNED_Q, ALIGNED_FQ, PRECISION, INTERPRETED,
    ).to(DTYPE)  # fmt: skip
    other = lifted_query(
        q, q_factor, q_bias, queries, partners.to(tl.int64),
        stride_qm, stride_qr, stride_qfd, stride_qfr, stride_qbd,
        M, D, R_Q, BLOCK_M, COLUMNS, BLOCK_RQ, QUERIES_FIT, True, HAS_Q_BIAS,
        ALIGNED_Q, ALIGNED_FQ, PRECISION, INTERPRETED,
    ).to(DTYPE)  # fmt: skip
    ALL_TURN: tl.constexpr = ROTARY_DIM == COLUMNS
    entries = entries.to(tl.int64)
    turned = own.to(tl.float32)
    added = other.to(tl.float32)
    if NORM_EPS > 0:
        inverse = tl.rsqrt(tl.sum(turned * turned, 1) / D + NORM_EPS)[:, None]
        turned = turned * inverse
        added = added * inverse
        if HAS_Q_NORM:
            FIT: tl.constexpr = D == COLUMNS
            turned = turned * load_bias(q_norm, columns.to(tl.int64), 1, D, FIT)[None, :]
            added = added * load_bias(q_norm, partners.to(tl.int64), 1, D, FIT)[None, :]
    turned = turned * _angles(
        cos, queries, entries, turns, stride_cm, stride_ct, M, 1.0, QUERIES_FIT, ALL_TURN
    )
    added = added * _angles(
        sin, queries, entries, turns, stride_sm, stride_st, M, 0.0, QUERIES_FIT, ALL_TURN
    )
    return turned + tl.where(is_first[None, :], -added, added)
