"""Rank-space attention in one Triton kernel: K and V stay latents, the output is lifted once.

    q̃      = (P_q V_qᵀ + b_q) V_k                    once a tile of queries
    S      = scale · q̃ P_kᵀ + mask                   streamed over tiles of keys
    output = (softmax(S) P_v) V_vᵀ + b_v             lifted in the epilogue

Operands, shapes and the rule of heads: ``attention_operands.py``. Notation here: B batch, H
heads, M queries, N keys, D and D_V head dims, R_Q, R_K, R_V ranks; BLOCK_M × BLOCK_N a tile of
scores. R_K and R_V are padded to a power of two on chip. The lifts at either end walk D, R_Q and
D_V in chunks of BLOCK_D, BLOCK_RQ and BLOCK_DV, so head dims cost no memory. The rows of X begin
at multiples of ALIGNED_X bytes.

No running maximum. softmax is the same whatever is subtracted from a row of S, as long as the
exponentials stay within their format. So the maximum of the first tile of keys is subtracted from
all, and nothing is rescaled on the way; a row whose sum comes out beyond LEAST_SUM or MOST_SUM
sends its tile of queries round again, with the true maxima, found in a pass over the keys.

Masks. A boolean mask that is alike for all queries is scanned ahead: keys before the first and
after the last that it shows are skipped, and tiles before the first that it then hides are read
without it. Any other mask is read tile by tile.

No branch goes around a matmul that another follows: ptxas 12.8, which Triton 3.6 ships, computes
operands' addresses in blocks that such a branch skips (tests/gpu/test_machine_code.py). So there
is one loop over keys, never empty, and the second attempt stands last, with its own epilogue.

Operations: 2·M·N·(R_K + R_V) a head, against 4·M·N·D lifted. Bytes from memory: the latents, the
factors and the output, once a tile of queries; P_k and P_v are copied first where their rank is
not innermost in memory (see `_rank_innermost`). Never in memory: Q, K, V at full width, q̃,
scores, probabilities, the latent output, and the mask at more than its own shape.

Rounds to the operands' dtype: the lifted query, q̃ (times the scale where it is computed),
exponentials, the latent output, the output. All else is float32. Exponentials are of base 2;
log2(e) is folded into the scale, except under an additive mask: finfo.min · log2(e) would
overflow to -inf, so there the reference is subtracted first.
"""

import torch
import triton
import triton.language as tl
from flashsvd_compile.kernels.attention_operands import attention_shape
from flashsvd_compile.kernels.attention_tiles import (
    SWIZZLE_BYTES,
    AttentionExtents,
    common_width,
    default_tile,
    lift_chunk,
    rank_padded,
    sram_bytes_of,
)
from flashsvd_compile.kernels.primitives import dot, is_empty, is_multiple, launch, row_alignment
from flashsvd_compile.kernels.tiles import TileConfig
from torch import Tensor

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2E = tl.constexpr(1.4426950408889634)

# Keys of which a mask that is alike for all queries is read at once, ahead of the loop.
SCANNED_KEYS = tl.constexpr(1024)

# What the sum of a row's exponentials may be when their reference is not the row's own maximum;
# outside, it is computed again with the maximum. 2**±32 leaves float32 and bfloat16 far from their
# ends; float16 ends at 2**16 and loses digits below 2**-14.
LEAST_SUM = tl.constexpr(2.0**-32)
MOST_SUM = tl.constexpr(2.0**32)
LEAST_SUM_16 = tl.constexpr(0.5)
MOST_SUM_16 = tl.constexpr(2.0**15)

# Shared memory that the interpreter's tiles are chosen for, so that they are those of a GPU.
INTERPRETER_SRAM_BYTES = 99 * 1024


@triton.jit
def _load(
    base,
    rows,
    columns,
    stride_row,
    stride_column,
    row_limit,
    column_limit,
    CHECK_ROWS: tl.constexpr,
    CHECK_COLUMNS: tl.constexpr,
    ALIGNED_ROWS: tl.constexpr = 1,
    ALIGNED_COLUMNS: tl.constexpr = 1,
):
    """A 2-D tile at int64 ``rows`` [I, 1] and ``columns`` [1, J]; zero beyond the limits.

    Along the dimension that is contiguous in memory each run of it begins at a multiple of
    ALIGNED_… bytes.
    """
    pointers = base + (rows * stride_row + columns * stride_column)
    pointers = tl.multiple_of(pointers, (ALIGNED_ROWS, ALIGNED_COLUMNS))
    if CHECK_ROWS and CHECK_COLUMNS:
        tile = tl.load(pointers, mask=(rows < row_limit) & (columns < column_limit), other=0.0)
    elif CHECK_ROWS:
        tile = tl.load(pointers, mask=rows < row_limit, other=0.0)
    elif CHECK_COLUMNS:
        tile = tl.load(pointers, mask=columns < column_limit, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _load_vector(base, columns, stride, limit, FIT: tl.constexpr):
    """A bias at int64 ``columns``, in float32; zero beyond the limit."""
    if FIT:
        vector = tl.load(base + columns * stride)
    else:
        vector = tl.load(base + columns * stride, mask=columns < limit, other=0.0)
    return vector.to(tl.float32)


@triton.jit
def _lifted_query(
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
        bias = _load_vector(q_bias, columns, stride_qbd, D, COLUMNS_FIT)
    if HAS_Q_FACTOR:
        lifted = tl.zeros([BLOCK_M, BLOCK_COLUMNS], tl.float32)
        for start in tl.range(0, R_Q, BLOCK_RQ, num_stages=1):
            ranks = (start + tl.arange(0, BLOCK_RQ)).to(tl.int64)
            latent = _load(
                q, queries[:, None], ranks[None, :], stride_qm, stride_qr,
                M, R_Q, not QUERIES_FIT, not RANKS_FIT, 1, ALIGNED_Q,
            )  # fmt: skip
            factor = _load(
                q_factor, ranks[:, None], columns[None, :], stride_qfr, stride_qfd,
                R_Q, D, not RANKS_FIT, not COLUMNS_FIT, ALIGNED_FQ, 1,
            )  # fmt: skip
            lifted = dot(latent, factor, lifted, PRECISION, INTERPRETED)
    else:
        lifted = _load(
            q, queries[:, None], columns[None, :], stride_qm, stride_qr,
            M, D, not QUERIES_FIT, not COLUMNS_FIT, 1, ALIGNED_Q,
        ).to(tl.float32)  # fmt: skip
    if HAS_Q_BIAS:
        lifted += bias[None, :]
    return lifted


@triton.jit
def _store(
    out, v_bias, output, has_seen, queries, columns, stride_om, stride_od, stride_vbd, M, D_V,
    HAS_V_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    QUERIES_FIT: tl.constexpr, COLUMNS_FIT: tl.constexpr,
):  # fmt: skip
    """Write ``columns`` of the output, as far as it reaches."""
    if HAS_V_BIAS:
        bias = _load_vector(v_bias, columns, stride_vbd, D_V, COLUMNS_FIT)[None, :]
        if HAS_MASK:
            bias = tl.where(has_seen[:, None], bias, 0.0)
        output += bias
    output = output.to(out.dtype.element_ty)
    pointers = out + (queries[:, None] * stride_om + columns[None, :] * stride_od)
    if QUERIES_FIT and COLUMNS_FIT:
        tl.store(pointers, output)
    elif QUERIES_FIT:
        tl.store(pointers, output, mask=(columns < D_V)[None, :])
    elif COLUMNS_FIT:
        tl.store(pointers, output, mask=(queries < M)[:, None])
    else:
        tl.store(pointers, output, mask=(queries < M)[:, None] & (columns < D_V)[None, :])


@triton.jit
def _seen_keys(mask, stride_mn, N, CHUNK: tl.constexpr):
    """What a mask that is alike for all queries leaves of the keys, as three positions.

    The first key that it shows, the first one after it that it hides, and one past the last that
    it shows; ``(N, N, 0)`` where it shows none.
    """
    first_seen = N
    first_hidden = N
    end = N * 0
    for first_key in tl.range(0, N, CHUNK):
        keys = first_key + tl.arange(0, CHUNK)
        is_inside = keys < N
        is_seen = tl.load(mask + keys.to(tl.int64) * stride_mn, mask=is_inside, other=False)
        first_seen = tl.minimum(first_seen, tl.min(tl.where(is_seen, keys, N)))
        end = tl.maximum(end, tl.max(tl.where(is_seen, keys + 1, 0)))
        is_hidden = is_inside & (is_seen == 0) & (keys > first_seen)
        first_hidden = tl.minimum(first_hidden, tl.min(tl.where(is_hidden, keys, N)))
    return first_seen, first_hidden, end


@triton.jit
def _scores(
    position, first_checked, q_latent, k, mask, queries, keys, ranks_k, mask_rows,
    stride_kn, stride_kr, stride_mm, stride_mn, scale, M, N,
    R_K: tl.constexpr, R_K_PADDED: tl.constexpr,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, FITS: tl.constexpr,
    IS_SCALED: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED_K: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Masked scores [BLOCK_M, BLOCK_N] of the keys from ``position`` on, where k and mask point."""
    keys_left = N - position
    keys_wide = keys.to(tl.int64)
    if MASK == "added" or MASK == "rows":  # ahead of the dot, which hides the load
        mask_tile = _load(
            mask, mask_rows, keys_wide[None, :], stride_mm, stride_mn,
            M, keys_left, False, not FITS,
        )  # fmt: skip
    key_tile = _load(
        k, ranks_k[:, None], keys_wide[None, :], stride_kr, stride_kn,
        R_K, keys_left, R_K_PADDED > R_K, not FITS, ALIGNED_K, 1,
    )  # fmt: skip
    scores = dot(q_latent, key_tile, None, PRECISION, INTERPRETED)
    if not IS_SCALED:
        scores = scores * scale
    if MASK == "added":
        scores += mask_tile.to(tl.float32)
    elif MASK == "rows":
        scores = tl.where(mask_tile, scores, float("-inf"))
    if IS_CAUSAL or not FITS:  # noqa: SIM102 (this one is decided at compile time)
        if position + BLOCK_N > first_checked:
            seen = (keys < keys_left)[None, :]
            if MASK == "scanned":
                is_inside = keys < keys_left
                seen = tl.load(mask + keys_wide * stride_mn, mask=is_inside, other=False)[None, :]
            if IS_CAUSAL:
                seen = seen & (position + keys[None, :] <= queries[:, None])
            scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def _row_maximum(
    first_key, first_checked, end, q_latent, k, mask, queries, ranks_k, mask_rows,
    stride_kn, stride_kr, stride_mm, stride_mn, scale, M, N,
    R_K: tl.constexpr, R_K_PADDED: tl.constexpr,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, FITS: tl.constexpr,
    IS_SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGNED_K: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The largest score of each query over [first_key, end); 0 where it sees none."""
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    keys = tl.arange(0, BLOCK_N)
    step = tl.full([], BLOCK_N, tl.int64)
    tl.assume(first_key < end)
    for position in tl.range(first_key, end, BLOCK_N, num_stages=1):
        scores = _scores(
            position, first_checked, q_latent, k, mask, queries, keys, ranks_k, mask_rows,
            stride_kn, stride_kr, stride_mm, stride_mn, scale, M, N, R_K, R_K_PADDED,
            MASK, IS_CAUSAL, FITS, IS_SCALED, BLOCK_N, ALIGNED_K, PRECISION, INTERPRETED,
        )  # fmt: skip
        maximum = tl.maximum(maximum, tl.max(scores, 1))
        k += step * stride_kn
        mask += step * stride_mn
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _stream(
    first_key, first_checked, end, reference, q_latent, k, v, mask,
    queries, ranks_k, ranks_v, mask_rows,
    stride_kn, stride_kr, stride_vn, stride_vr, stride_mm, stride_mn, scale, M, N,
    R_K: tl.constexpr, R_V: tl.constexpr, R_K_PADDED: tl.constexpr, R_V_PADDED: tl.constexpr,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, FITS: tl.constexpr,
    IS_SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    ALIGNED_K: tl.constexpr, ALIGNED_V: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Over the keys of [first_key, end): the sum of exp2(score - reference), and that of P_v so
    weighted. ``k``, ``v`` and ``mask`` point at ``first_key``."""
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    latent = tl.zeros([BLOCK_M, R_V_PADDED], tl.float32)
    keys = tl.arange(0, BLOCK_N)
    # The bases walk in int64: BLOCK_N rows of a large stride pass 2**31 elements.
    step = tl.full([], BLOCK_N, tl.int64)
    tl.assume(first_key < end)
    for position in tl.range(first_key, end, BLOCK_N, num_stages=STAGES):
        scores = _scores(
            position, first_checked, q_latent, k, mask, queries, keys, ranks_k, mask_rows,
            stride_kn, stride_kr, stride_mm, stride_mn, scale, M, N, R_K, R_K_PADDED,
            MASK, IS_CAUSAL, FITS, IS_SCALED, BLOCK_N, ALIGNED_K, PRECISION, INTERPRETED,
        )  # fmt: skip
        weights = scores - reference[:, None]
        if MASK == "added":
            weights = weights * LOG2E
        weights = tl.exp2(weights)
        row_sum += tl.sum(weights, 1)
        value_tile = _load(
            v, keys.to(tl.int64)[:, None], ranks_v[None, :], stride_vn, stride_vr,
            N - position, R_V, not FITS, R_V_PADDED > R_V, 1, ALIGNED_V,
        )  # fmt: skip
        latent = dot(weights.to(q_latent.dtype), value_tile, latent, PRECISION, INTERPRETED)
        k += step * stride_kn
        v += step * stride_vn
        mask += step * stride_mn
    return row_sum, latent


@triton.jit
def _finish(
    latent, row_sum, v_factor, v_bias, out, queries, ranks_v,
    stride_vfd, stride_vfr, stride_vbd, stride_om, stride_od, M,
    D_V: tl.constexpr, R_V: tl.constexpr, R_V_PADDED: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_V_FACTOR: tl.constexpr, HAS_V_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    QUERIES_FIT: tl.constexpr, ALIGNED_FV: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Normalize and lift the latent output, add b_v to the rows that see a key, and store."""
    has_seen = row_sum > 0
    if HAS_MASK:
        row_sum = tl.where(has_seen, row_sum, 1.0)
    normalized = latent * (1 / row_sum)[:, None]
    COLUMNS_FIT: tl.constexpr = D_V % (BLOCK_DV if HAS_V_FACTOR else R_V_PADDED) == 0
    if HAS_V_FACTOR:
        normalized = normalized.to(v_factor.dtype.element_ty)
        for first_column in tl.range(0, D_V, BLOCK_DV, num_stages=1):
            columns = (first_column + tl.arange(0, BLOCK_DV)).to(tl.int64)
            factor = _load(
                v_factor, ranks_v[:, None], columns[None, :], stride_vfr, stride_vfd,
                R_V, D_V, R_V_PADDED > R_V, not COLUMNS_FIT, ALIGNED_FV, 1,
            )  # fmt: skip
            lifted = dot(normalized, factor, None, PRECISION, INTERPRETED)
            _store(
                out, v_bias, lifted, has_seen, queries, columns, stride_om, stride_od, stride_vbd,
                M, D_V, HAS_V_BIAS, HAS_MASK, QUERIES_FIT, COLUMNS_FIT,
            )  # fmt: skip
    else:
        _store(
            out, v_bias, normalized, has_seen, queries, ranks_v, stride_om, stride_od, stride_vbd,
            M, D_V, HAS_V_BIAS, HAS_MASK, QUERIES_FIT, COLUMNS_FIT,
        )  # fmt: skip


@triton.jit
def _rank_space_attention_kernel(
    q, k, v, q_factor, q_bias, k_factor, v_factor, v_bias, mask, out,
    stride_qb, stride_qh, stride_qm, stride_qr,
    stride_kb, stride_kh, stride_kn, stride_kr,
    stride_vb, stride_vh, stride_vn, stride_vr,
    stride_qfh, stride_qfd, stride_qfr,
    stride_qbh, stride_qbd,
    stride_kfh, stride_kfd, stride_kfr,
    stride_vfh, stride_vfd, stride_vfr,
    stride_vbh, stride_vbd,
    stride_mb, stride_mh, stride_mm, stride_mn,
    stride_ob, stride_oh, stride_om, stride_od,
    scale, M, N,
    H: tl.constexpr, H_Q: tl.constexpr, H_K: tl.constexpr, H_V: tl.constexpr,
    H_FQ: tl.constexpr, H_BQ: tl.constexpr, H_FK: tl.constexpr,
    H_FV: tl.constexpr, H_BV: tl.constexpr,
    D: tl.constexpr, D_V: tl.constexpr,
    R_Q: tl.constexpr, R_K: tl.constexpr, R_V: tl.constexpr,
    HAS_Q_FACTOR: tl.constexpr, HAS_Q_BIAS: tl.constexpr, HAS_K_FACTOR: tl.constexpr,
    HAS_V_FACTOR: tl.constexpr, HAS_V_BIAS: tl.constexpr,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, QUERIES_FIT: tl.constexpr, KEYS_FIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_RQ: tl.constexpr, BLOCK_DV: tl.constexpr,
    R_K_PADDED: tl.constexpr, R_V_PADDED: tl.constexpr,
    ALIGNED_Q: tl.constexpr, ALIGNED_K: tl.constexpr, ALIGNED_V: tl.constexpr,
    ALIGNED_FQ: tl.constexpr, ALIGNED_FK: tl.constexpr, ALIGNED_FV: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head, over all their keys."""
    tiles = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0) % tiles
    pair = tl.program_id(0) // tiles
    batch = (pair // H).to(tl.int64)
    head = (pair % H).to(tl.int64)
    if IS_CAUSAL:  # the longest rows first, so that the last programs to run are short
        tile = tiles - 1 - tile
    first_query = tile * BLOCK_M

    q += batch * stride_qb + head // (H // H_Q) * stride_qh
    k += batch * stride_kb + head // (H // H_K) * stride_kh
    v += batch * stride_vb + head // (H // H_V) * stride_vh
    q_factor += head // (H // H_FQ) * stride_qfh
    q_bias += head // (H // H_BQ) * stride_qbh
    k_factor += head // (H // H_FK) * stride_kfh
    v_factor += head // (H // H_FV) * stride_vfh
    v_bias += head // (H // H_BV) * stride_vbh
    mask += batch * stride_mb + head * stride_mh
    out += batch * stride_ob + head * stride_oh

    DTYPE: tl.constexpr = q.dtype.element_ty
    IS_SCALED: tl.constexpr = HAS_Q_FACTOR or HAS_K_FACTOR
    # A scanned mask lets tiles begin anywhere; else only the last may reach beyond the keys.
    FITS: tl.constexpr = KEYS_FIT and MASK != "scanned"

    queries = (first_query + tl.arange(0, BLOCK_M)).to(tl.int64)
    ranks_k = tl.arange(0, R_K_PADDED).to(tl.int64)
    ranks_v = tl.arange(0, R_V_PADDED).to(tl.int64)

    # Keys from ``first_key`` to ``first_checked`` are seen by all queries of this tile; those from
    # there to ``end`` need a check.
    first_key = 0
    first_checked = N
    end = N
    if MASK == "scanned":
        first_key, first_checked, end = _seen_keys(mask, stride_mn, N, SCANNED_KEYS)
        k += tl.cast(first_key, tl.int64) * stride_kn
        v += tl.cast(first_key, tl.int64) * stride_vn
        mask += tl.cast(first_key, tl.int64) * stride_mn
    if IS_CAUSAL:
        first_checked = tl.minimum(first_checked, first_query + 1)
        end = tl.minimum(end, first_query + BLOCK_M)
    has_keys = first_key < end
    end = tl.maximum(end, first_key + 1)
    # Asked for before q̃ is computed, which hides its latency.
    first_tile = _load(
        k, ranks_k[:, None], tl.arange(0, BLOCK_N).to(tl.int64)[None, :], stride_kr, stride_kn,
        R_K, N - first_key, R_K_PADDED > R_K, not FITS, ALIGNED_K, 1,
    )  # fmt: skip
    mask_rows = tl.zeros([1, 1], tl.int64)
    if MASK == "added" or MASK == "rows":
        mask_rows = tl.minimum(queries, M - 1)[:, None]

    # q̃, the queries that latent keys are scored with
    if HAS_K_FACTOR:
        q_latent = tl.zeros([BLOCK_M, R_K_PADDED], tl.float32)
        for start in tl.range(0, D, BLOCK_D, num_stages=1):
            columns = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            factor = _load(  # asked for before the lift, which hides its latency
                k_factor, columns[:, None], ranks_k[None, :], stride_kfd, stride_kfr,
                D, R_K, D % BLOCK_D != 0, R_K_PADDED > R_K, 1, ALIGNED_FK,
            )  # fmt: skip
            lifted = _lifted_query(
                q, q_factor, q_bias, queries, columns,
                stride_qm, stride_qr, stride_qfd, stride_qfr, stride_qbd,
                M, D, R_Q, BLOCK_M, BLOCK_D, BLOCK_RQ, QUERIES_FIT, HAS_Q_FACTOR, HAS_Q_BIAS,
                ALIGNED_Q, ALIGNED_FQ, PRECISION, INTERPRETED,
            ).to(DTYPE)  # fmt: skip
            q_latent = dot(lifted, factor, q_latent, PRECISION, INTERPRETED)
    else:
        q_latent = _lifted_query(
            q, q_factor, q_bias, queries, ranks_k,
            stride_qm, stride_qr, stride_qfd, stride_qfr, stride_qbd,
            M, D, R_Q, BLOCK_M, R_K_PADDED, BLOCK_RQ, QUERIES_FIT, HAS_Q_FACTOR, HAS_Q_BIAS,
            ALIGNED_Q, ALIGNED_FQ, PRECISION, INTERPRETED,
        )  # fmt: skip

    # A q̃ that is rounded anyway takes the scale along; dense queries keep their exact values.
    if MASK != "added":
        scale = scale * LOG2E
    if IS_SCALED:
        q_latent = q_latent * scale
    q_latent = q_latent.to(DTYPE)

    reference = dot(q_latent, first_tile, None, PRECISION, INTERPRETED)
    if not IS_SCALED:
        reference = reference * scale
    reference = tl.max(reference, 1)
    row_sum, latent = _stream(
        first_key, first_checked, end, reference, q_latent, k, v, mask,
        queries, ranks_k, ranks_v, mask_rows,
        stride_kn, stride_kr, stride_vn, stride_vr, stride_mm, stride_mn, scale, M, N,
        R_K, R_V, R_K_PADDED, R_V_PADDED, MASK, IS_CAUSAL, FITS, IS_SCALED, BLOCK_M, BLOCK_N, None,
        ALIGNED_K, ALIGNED_V, PRECISION, INTERPRETED,
    )  # fmt: skip
    _finish(
        latent, row_sum, v_factor, v_bias, out, queries, ranks_v,
        stride_vfd, stride_vfr, stride_vbd, stride_om, stride_od, M,
        D_V, R_V, R_V_PADDED, BLOCK_DV, HAS_V_FACTOR, HAS_V_BIAS, MASK != "none",
        QUERIES_FIT, ALIGNED_FV, PRECISION, INTERPRETED,
    )  # fmt: skip
    LEAST: tl.constexpr = LEAST_SUM_16 if DTYPE == tl.float16 else LEAST_SUM  # noqa: SIM300
    MOST: tl.constexpr = MOST_SUM_16 if DTYPE == tl.float16 else MOST_SUM  # noqa: SIM300
    is_right = (row_sum > LEAST) & (row_sum < MOST)
    if (tl.sum(is_right.to(tl.int32)) < BLOCK_M) & has_keys:
        reference = _row_maximum(
            first_key, first_checked, end, q_latent, k, mask, queries, ranks_k, mask_rows,
            stride_kn, stride_kr, stride_mm, stride_mn, scale, M, N, R_K, R_K_PADDED,
            MASK, IS_CAUSAL, FITS, IS_SCALED, BLOCK_M, BLOCK_N, ALIGNED_K, PRECISION, INTERPRETED,
        )  # fmt: skip
        row_sum, latent = _stream(
            first_key, first_checked, end, reference, q_latent, k, v, mask,
            queries, ranks_k, ranks_v, mask_rows,
            stride_kn, stride_kr, stride_vn, stride_vr, stride_mm, stride_mn, scale, M, N,
            R_K, R_V, R_K_PADDED, R_V_PADDED, MASK, IS_CAUSAL, FITS, IS_SCALED, BLOCK_M, BLOCK_N, 1,
            ALIGNED_K, ALIGNED_V, PRECISION, INTERPRETED,
        )  # fmt: skip
        _finish(
            latent, row_sum, v_factor, v_bias, out, queries, ranks_v,
            stride_vfd, stride_vfr, stride_vbd, stride_om, stride_od, M,
            D_V, R_V, R_V_PADDED, BLOCK_DV, HAS_V_FACTOR, HAS_V_BIAS, MASK != "none",
            QUERIES_FIT, ALIGNED_FV, PRECISION, INTERPRETED,
        )  # fmt: skip


def rank_space_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    q_factor: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_factor: Tensor | None = None,
    v_factor: Tensor | None = None,
    v_bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float,
    tile: TileConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """[B, H, M, D_v], a view of memory laid out [B, M, H, D_v] unless ``out`` gives the buffer."""
    shape = attention_shape(
        q,
        k,
        v,
        num_heads=num_heads,
        q_factor=q_factor,
        q_bias=q_bias,
        k_factor=k_factor,
        v_factor=v_factor,
        v_bias=v_bias,
        mask=mask,
    )
    if q.dtype not in SUPPORTED_DTYPES:
        supported = ", ".join(str(dtype) for dtype in SUPPORTED_DTYPES)
        raise ValueError(f"the kernel runs {supported}, q is {q.dtype}")
    out_shape = (shape.batch, num_heads, shape.queries, shape.head_dim_v)
    if out is None:
        rows = (shape.batch, shape.queries, num_heads, shape.head_dim_v)
        out = torch.empty(rows, dtype=q.dtype, device=q.device).transpose(1, 2)
    elif tuple(out.shape) != out_shape or out.dtype != q.dtype or out.device != q.device:
        raise ValueError(
            f"out must be {list(out_shape)} of {q.dtype} on {q.device}, "
            f"is {list(out.shape)} of {out.dtype} on {out.device}"
        )
    if is_empty(out):
        return out
    if is_empty(k):  # no query sees a key
        return out.zero_()
    k, v = _rank_innermost(k), _rank_innermost(v)
    width = common_width(shape.rank_q, shape.rank_k, shape.rank_v, q.element_size())
    if not all(_is_rank_contiguous(x) for x in (q, k, v, q_factor, k_factor, v_factor)):
        width = SWIZZLE_BYTES // q.element_size()
    extents = AttentionExtents(
        head_dim_qk=shape.head_dim_qk,
        head_dim_v=shape.head_dim_v,
        rank_q=max(shape.rank_q, width),
        rank_k=max(shape.rank_k, width),
        rank_v=max(shape.rank_v, width),
        q_lifted=q_factor is not None,
        v_lifted=v_factor is not None,
        element_bytes=q.element_size(),
        mask_bytes=0 if mask is None or mask.shape[2] == 1 else mask.element_size(),
    )
    sram_bytes = _sram_bytes(q.device)
    # A tile may be planned before it is known how the operands lie in memory.
    if tile is None or sram_bytes_of(tile, extents) > sram_bytes:
        tile = _default_tile(extents, sram_bytes)

    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    programs = triton.cdiv(shape.queries, tile.block_m) * num_heads * shape.batch
    operands = (
        # An absent operand is passed as q with strides of 0; the kernel never reads it.
        q, k, v,
        *(q if x is None else x for x in (q_factor, q_bias, k_factor, v_factor, v_bias, mask)),
        out,
        *q.stride(), *k.stride(), *v.stride(),
        *_strides(q_factor, 3), *_strides(q_bias, 2),
        *_strides(k_factor, 3), *_strides(v_factor, 3), *_strides(v_bias, 2),
        *_mask_strides(mask),
        *out.stride(),
        scale, shape.queries, shape.keys,
    )  # fmt: skip
    launch(
        _rank_space_attention_kernel, programs, tile, operands,
        H=num_heads, H_Q=q.shape[1], H_K=k.shape[1], H_V=v.shape[1],
        H_FQ=_heads(q_factor), H_BQ=_heads(q_bias), H_FK=_heads(k_factor),
        H_FV=_heads(v_factor), H_BV=_heads(v_bias),
        D=shape.head_dim_qk, D_V=shape.head_dim_v,
        R_Q=shape.rank_q, R_K=shape.rank_k, R_V=shape.rank_v,
        HAS_Q_FACTOR=q_factor is not None, HAS_Q_BIAS=q_bias is not None,
        HAS_K_FACTOR=k_factor is not None,
        HAS_V_FACTOR=v_factor is not None, HAS_V_BIAS=v_bias is not None,
        MASK=_kind_of(mask), IS_CAUSAL=is_causal,
        QUERIES_FIT=is_multiple(shape.queries, tile.block_m),
        KEYS_FIT=is_multiple(shape.keys, tile.block_n),
        BLOCK_D=lift_chunk(shape.head_dim_qk, width), BLOCK_RQ=lift_chunk(shape.rank_q, width),
        BLOCK_DV=lift_chunk(shape.head_dim_v, width),
        R_K_PADDED=rank_padded(shape.rank_k, width), R_V_PADDED=rank_padded(shape.rank_v, width),
        ALIGNED_Q=row_alignment(q), ALIGNED_K=row_alignment(k), ALIGNED_V=row_alignment(v),
        ALIGNED_FQ=row_alignment(q_factor), ALIGNED_FK=row_alignment(k_factor),
        ALIGNED_FV=row_alignment(v_factor),
        PRECISION="tf32" if tf32 else "ieee",
    )  # fmt: skip
    return out


def _heads(operand: Tensor | None) -> int:
    return 1 if operand is None else operand.shape[0]


def _strides(operand: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if operand is None else operand.stride()


def _rank_innermost(latent: Tensor) -> Tensor:
    """``latent``, copied where another dimension runs fastest in memory.

    Its tiles would then swizzle by BLOCK_N, unlike the others: see `common_width`.
    """
    return latent if latent.stride(-1) == 1 or latent.shape[-1] == 1 else latent.contiguous()


def _is_rank_contiguous(operand: Tensor | None) -> bool:
    """Whether a tile of it lies in shared memory with its rank innermost."""
    return operand is None or (operand.stride(-1) == 1 and operand.shape[-1] > 1)


def _kind_of(mask: Tensor | None) -> str:
    """A boolean mask that is alike for all queries is scanned ahead of the loop over keys."""
    if mask is None:
        return "none"
    if mask.dtype != torch.bool:
        return "added"
    return "rows" if mask.shape[2] != 1 else "scanned"


def _mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    """A dimension of size 1 is read again and again: its stride is 0, whatever it says."""
    if mask is None:
        return (0,) * 4
    return tuple(0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True))


def _sram_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_SRAM_BYTES
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


def _default_tile(extents: AttentionExtents, sram_bytes: int) -> TileConfig:
    tile = default_tile(extents, sram_bytes)
    if tile is None:
        raise ValueError(
            f"no attention tile of ranks {extents.rank_q}, {extents.rank_k}, {extents.rank_v} fits "
            f"{sram_bytes} bytes of shared memory"
        )
    return tile
