"""Rank-space attention in one Triton kernel: K and V stay latents, the output is lifted once.

    q̃      = (P_q V_qᵀ + b_q) V_k                    once a tile of queries
    S      = scale · q̃ P_kᵀ + mask                   streamed over tiles of keys
    output = (softmax(S) P_v) V_vᵀ + b_v             lifted in the epilogue

Operands, shapes and the rule of heads: ``attention_operands.py``. Notation here: B batch, H
heads, M queries, N keys, D and D_V head dims, R_Q, R_K, R_V ranks; BLOCK_M × BLOCK_N a tile of
scores. R_K and R_V are padded to a power of two on chip. The lifts at either end walk D, R_Q and
D_V in chunks of BLOCK_D, BLOCK_RQ and BLOCK_DV, so head dims cost no memory. The rows of X begin
at multiples of ALIGNED_X bytes. DESCRIBED: the loop reads P_k and P_v through tensor descriptors,
whose tiles cost no addresses and no registers.

No running maximum. softmax is the same whatever is subtracted from a row of S, as long as the
exponentials stay within their format. So the maximum of the first tile of keys is subtracted from
all, and nothing is rescaled on the way; a row whose sum comes out beyond LEAST_SUM or MOST_SUM
sends its tile of queries round again, with the true maxima, found in a pass over the keys. That
takes three times as long: rows of a mask that hide all keys do so, and biases that grow with
distance (ALiBi), and in float16 sums from 2¹⁵ on.

Soft-cap and sink. With SOFTCAP the scale is divided by it, tanh follows each product with P_k, and
log2(e) goes into what multiplies it: the same three places, of the first tile, the maxima and the
sums. A sink is no key: its exponential joins the sum once all keys are counted, and is inf or 0
where it is far from the reference, as it should be. What a bias of v counts for is then the keys'
share of the sum. b_k adds shift = q b_k to a row's scores, once a tile of queries: within tanh, or
taken from the sink where there is none.

RoPE. With ROTARY_DIM keys are dense, turned by the model, and the lifted query is turned once a
tile of queries, normalised before with NORM_EPS (``attention_query.py``).

Masks. A boolean mask that is alike for all queries is scanned ahead: keys before the first and
after the last that it shows are skipped, and tiles before the first that it then hides are read
without it. Any other mask is read tile by tile. Where a query sees no further than ``ahead`` and
``behind`` of its own place, tiles that no query of a program sees are skipped, and those that all
of them see are not checked.

No branch goes around a matmul that another follows: ptxas 12.8, which Triton 3.6 ships, computes
operands' addresses in blocks that such a branch skips (tests/gpu/test_machine_code.py). So there
is one loop over keys, never empty, and the second attempt stands last, with its own epilogue.

Operations: 2·M·N·(R_K + R_V) a head, against 4·M·N·D lifted, and 2·M·BLOCK_N·R_K for the first
tile. Bytes from memory: the latents, the factors, the mask and the output, once a tile of
queries; P_k and P_v are copied first where their rank is not innermost in memory (see
``attention.py``). Never in memory: Q, K, V at full width, q̃, scores, exponentials, the latent
output, and the mask at more than its own shape.

Rounds to the operands' dtype: the lifted query, q̃ (times the scale where it is computed),
exponentials, the latent output, the output. All else is float32. The sum is of the exponentials as
they were before, where q̃ is rounded, which errs by more; else of the rounded ones. Exponentials
are of base 2; log2(e) is folded into the scale, except under an additive mask: finfo.min · log2(e)
would overflow to -inf, so there the reference is subtracted first.
"""

import triton
import triton.language as tl
from flashsvd_compile.kernels.attention_query import lifted_query, rotated_query
from flashsvd_compile.kernels.attention_stream import (
    LOG2E,
    capped,
    load_described,
    row_maximum,
    seen_keys,
    stream_keys,
)
from flashsvd_compile.kernels.primitives import dot
from flashsvd_compile.kernels.tile_loads import load_bias, load_tile

# What the sum of a row's exponentials may be when their reference is not the row's own maximum;
# outside, it is computed again with the maximum. 2**±32 leaves float32 and bfloat16 far from their
# ends; float16 ends at 2**16 and loses digits below 2**-14.
LEAST_SUM = tl.constexpr(2.0**-32)
MOST_SUM = tl.constexpr(2.0**32)
LEAST_SUM_FLOAT16 = tl.constexpr(0.5)
MOST_SUM_FLOAT16 = tl.constexpr(2.0**15)


@triton.jit
def _store(
    out, v_bias, output, has_seen, share, queries, columns, stride_om, stride_od, stride_vbd, M,
    D_V, HAS_V_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SINK: tl.constexpr,
    QUERIES_FIT: tl.constexpr, COLUMNS_FIT: tl.constexpr,
):  # fmt: skip
    """Write ``columns`` of the output, as far as it reaches."""
    if HAS_V_BIAS:
        bias = load_bias(v_bias, columns, stride_vbd, D_V, COLUMNS_FIT)[None, :]
        if HAS_SINK:
            bias = bias * share[:, None]
        elif HAS_MASK:
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
def _finish(
    latent, row_sum, of_sink, v_factor, v_bias, out, queries, ranks_v,
    stride_vfd, stride_vfr, stride_vbd, stride_om, stride_od, M,
    HAS_SINK: tl.constexpr, D_V: tl.constexpr, R_V: tl.constexpr, R_V_PADDED: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_V_FACTOR: tl.constexpr, HAS_V_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    QUERIES_FIT: tl.constexpr, ALIGNED_FV: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Normalize and lift the latent output, add b_v to the rows that see a key, and store.

    ``of_sink``: the sink's exponential.
    """
    has_seen = row_sum > 0
    share = row_sum
    if HAS_MASK:
        row_sum = tl.where(has_seen, row_sum, 1.0)
    if HAS_SINK:
        row_sum += of_sink
        share = share * (1 / row_sum)
    normalized = latent * (1 / row_sum)[:, None]
    # Unrolled, two chunks take 1 to 2% less of all time at ranks 32 to 64 with 512 keys (H100 80GB
    # HBM3, torch 2.11.0, triton 3.6.0, 2026-11-26); wider or odd ones spill hundreds of bytes.
    IS_SHORT: tl.constexpr = D_V == 2 * BLOCK_DV and R_V_PADDED <= 64 and ALIGNED_FV >= 16
    UNROLL: tl.constexpr = 2 if IS_SHORT else 1
    COLUMNS_FIT: tl.constexpr = D_V % (BLOCK_DV if HAS_V_FACTOR else R_V_PADDED) == 0
    if HAS_V_FACTOR:
        normalized = normalized.to(v_factor.dtype.element_ty)
        for first_column in tl.range(0, D_V, BLOCK_DV, num_stages=1, loop_unroll_factor=UNROLL):
            columns = (first_column + tl.arange(0, BLOCK_DV)).to(tl.int64)
            factor = load_tile(
                v_factor, ranks_v[:, None], columns[None, :], stride_vfr, stride_vfd,
                R_V, D_V, R_V_PADDED > R_V, not COLUMNS_FIT, ALIGNED_FV, 1,
            )  # fmt: skip
            lifted = dot(normalized, factor, None, PRECISION, INTERPRETED)
            _store(
                out, v_bias, lifted, has_seen, share, queries, columns, stride_om, stride_od,
                stride_vbd, M, D_V, HAS_V_BIAS, HAS_MASK, HAS_SINK, QUERIES_FIT, COLUMNS_FIT,
            )  # fmt: skip
    else:
        _store(
            out, v_bias, normalized, has_seen, share, queries, ranks_v, stride_om, stride_od,
            stride_vbd, M, D_V, HAS_V_BIAS, HAS_MASK, HAS_SINK, QUERIES_FIT, COLUMNS_FIT,
        )  # fmt: skip


@triton.jit
def _exponential_of(sink, reference, shift, HAS_SINK: tl.constexpr, NATURAL: tl.constexpr):
    """exp(sink - shift) over exp(reference), that of base 2 unless ``NATURAL``."""
    if not HAS_SINK:
        return reference
    if NATURAL:
        return tl.exp2((sink - shift - reference) * LOG2E)
    return tl.exp2(sink * LOG2E - shift - reference)


@triton.jit
def rank_space_attention_kernel(
    q, k, v, q_factor, q_bias, k_factor, v_factor, v_bias, k_bias, sink, cos, sin, mask, out,
    q_norm, k_described, v_described,
    stride_qb, stride_qh, stride_qm, stride_qr,
    stride_kb, stride_kh, stride_kn, stride_kr,
    stride_vb, stride_vh, stride_vn, stride_vr,
    stride_qfh, stride_qfd, stride_qfr,
    stride_qbh, stride_qbd,
    stride_kfh, stride_kfd, stride_kfr,
    stride_vfh, stride_vfd, stride_vfr,
    stride_vbh, stride_vbd,
    stride_kbh, stride_kbd,
    stride_sh,
    stride_cb, stride_cm, stride_ct,
    stride_sb, stride_sm, stride_st,
    stride_mb, stride_mh, stride_mm, stride_mn,
    stride_ob, stride_oh, stride_om, stride_od,
    scale, B, M, N, first_batch, first_head, ahead, behind,
    BATCHES: tl.constexpr, H: tl.constexpr, H_Q: tl.constexpr, H_K: tl.constexpr, H_V: tl.constexpr,
    H_FQ: tl.constexpr, H_BQ: tl.constexpr, H_FK: tl.constexpr,
    H_FV: tl.constexpr, H_BV: tl.constexpr, H_BK: tl.constexpr, H_S: tl.constexpr,
    D: tl.constexpr, D_V: tl.constexpr,
    R_Q: tl.constexpr, R_K: tl.constexpr, R_V: tl.constexpr,
    HAS_Q_FACTOR: tl.constexpr, HAS_Q_BIAS: tl.constexpr, HAS_K_FACTOR: tl.constexpr,
    HAS_V_FACTOR: tl.constexpr, HAS_V_BIAS: tl.constexpr,
    HAS_K_BIAS: tl.constexpr, HAS_SINK: tl.constexpr, SOFTCAP: tl.constexpr,
    ROTARY_DIM: tl.constexpr, ROTARY_PAIR: tl.constexpr, ONE_ANGLE: tl.constexpr,
    HAS_Q_NORM: tl.constexpr, NORM_EPS: tl.constexpr,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_AHEAD: tl.constexpr, HAS_BEHIND: tl.constexpr,
    QUERIES_FIT: tl.constexpr, KEYS_FIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_RQ: tl.constexpr, BLOCK_DV: tl.constexpr,
    R_K_PADDED: tl.constexpr, R_V_PADDED: tl.constexpr, DESCRIBED: tl.constexpr,
    ALIGNED_Q: tl.constexpr, ALIGNED_K: tl.constexpr, ALIGNED_V: tl.constexpr,
    ALIGNED_FQ: tl.constexpr, ALIGNED_FK: tl.constexpr, ALIGNED_FV: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head, over all their keys.

    ``first_batch``, ``first_head``: where in ``out`` this call's batch and heads begin.
    """
    tile = tl.program_id(0)
    head = (tl.program_id(1) % H).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    if BATCHES > 1:  # more than one axis of the grid holds; those beyond the last repeat it
        batch = tl.minimum(batch * BATCHES + tl.program_id(1) // H, B - 1)
    if IS_CAUSAL:  # the longest rows first, so that the last programs to run are short
        tile = tl.num_programs(0) - 1 - tile
    first_query = tile * BLOCK_M

    place = (
        batch.to(tl.int32),
        (head // (H // H_K)).to(tl.int32),
        (head // (H // H_V)).to(tl.int32),
    )
    q += batch * stride_qb + head // (H // H_Q) * stride_qh
    k += batch * stride_kb + head // (H // H_K) * stride_kh
    v += batch * stride_vb + head // (H // H_V) * stride_vh
    q_factor += head // (H // H_FQ) * stride_qfh
    q_bias += head // (H // H_BQ) * stride_qbh
    k_factor += head // (H // H_FK) * stride_kfh
    v_factor += head // (H // H_FV) * stride_vfh
    v_bias += head // (H // H_BV) * stride_vbh
    k_bias += head // (H // H_BK) * stride_kbh
    cos += batch * stride_cb
    sin += batch * stride_sb
    mask += batch * stride_mb + head * stride_mh
    out += (batch + first_batch) * stride_ob + (head + first_head) * stride_oh

    DTYPE: tl.constexpr = q.dtype.element_ty
    IS_SCALED: tl.constexpr = HAS_Q_FACTOR or HAS_K_FACTOR
    IS_FLOAT16: tl.constexpr = DTYPE == tl.float16  # noqa: SIM300
    # Scores that a mask shifts by query leave float16's range too often to try the first tile's.
    SEEKS_MAXIMUM: tl.constexpr = IS_FLOAT16 and (MASK == "added" or MASK == "rows")
    # A scanned mask lets tiles begin anywhere; else only the last may reach beyond the keys.
    FITS: tl.constexpr = KEYS_FIT and MASK != "scanned"
    HAS_MASK: tl.constexpr = MASK != "none" or HAS_AHEAD or HAS_BEHIND

    queries = (first_query + tl.arange(0, BLOCK_M)).to(tl.int64)
    ranks_k = tl.arange(0, R_K_PADDED).to(tl.int64)
    ranks_v = tl.arange(0, R_V_PADDED).to(tl.int64)

    # Keys from ``first_free`` to ``first_checked`` are seen by all queries of this tile; those from
    # ``first_key`` on before them, and those behind them to ``end``, need a check.
    first_key = 0
    first_free = 0
    first_checked = N
    end = N
    if MASK == "scanned":
        first_key, first_checked, end = seen_keys(mask, stride_mn, N)
    # What a query may see beside its mask: the keys from ``lowest`` to ``highest``.
    first_shown, last_shown, lowest, highest = first_key, end, queries, queries
    if HAS_AHEAD:
        ahead = tl.cast(ahead, tl.int32)
        highest = queries + ahead
    if HAS_BEHIND:
        behind = tl.cast(behind, tl.int32)
        lowest = queries - behind
        first_free = first_query + BLOCK_M - 1 - behind
        begin = tl.maximum(first_query - behind, 0)
        if MASK != "scanned":  # whole tiles
            begin = tl.minimum(begin, N - 1) // BLOCK_N * BLOCK_N
        first_key = tl.maximum(first_key, tl.minimum(begin, N))
    if MASK == "scanned" or HAS_BEHIND:
        k += tl.cast(first_key, tl.int64) * stride_kn
        v += tl.cast(first_key, tl.int64) * stride_vn
        mask += tl.cast(first_key, tl.int64) * stride_mn
    if IS_CAUSAL and HAS_AHEAD:
        first_checked = tl.minimum(first_checked, first_query + ahead + 1)
        end = tl.minimum(end, first_query + ahead + BLOCK_M)
    elif IS_CAUSAL:
        first_checked = tl.minimum(first_checked, first_query + 1)
        end = tl.minimum(end, first_query + BLOCK_M)
    has_keys = first_key < end
    end = tl.maximum(end, first_key + 1)
    # The first tile is asked for before q̃ is computed, which hides its latency.
    if not SEEKS_MAXIMUM and DESCRIBED:
        first_tile = load_described(k_described, place[0], place[1], first_key, BLOCK_N, R_K).T
    elif not SEEKS_MAXIMUM:
        first_tile = load_tile(
            k, ranks_k[:, None], tl.arange(0, BLOCK_N).to(tl.int64)[None, :], stride_kr, stride_kn,
            R_K, N - first_key, R_K_PADDED > R_K, not FITS, ALIGNED_K, 1,
        )  # fmt: skip
    of_sink = 0.0
    if HAS_SINK:
        of_sink = tl.load(sink + head // (H // H_S) * stride_sh).to(tl.float32)
    mask_rows = tl.zeros([1, 1], tl.int64)
    if MASK == "added" or MASK == "rows":
        mask_rows = tl.minimum(queries, M - 1)[:, None]

    # q̃, the queries that latent keys are scored with
    shift = 0.0
    if HAS_K_BIAS:
        shift = tl.zeros([BLOCK_M], tl.float32)
    if HAS_K_FACTOR:
        q_latent = tl.zeros([BLOCK_M, R_K_PADDED], tl.float32)
        for start in tl.range(0, D, BLOCK_D, num_stages=1):
            columns = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            factor = load_tile(  # asked for before the lift, which hides its latency
                k_factor, columns[:, None], ranks_k[None, :], stride_kfd, stride_kfr,
                D, R_K, D % BLOCK_D != 0, R_K_PADDED > R_K, 1, ALIGNED_FK,
            )  # fmt: skip
            lifted = lifted_query(
                q, q_factor, q_bias, queries, columns,
                stride_qm, stride_qr, stride_qfd, stride_qfr, stride_qbd,
                M, D, R_Q, BLOCK_M, BLOCK_D, BLOCK_RQ, QUERIES_FIT, HAS_Q_FACTOR, HAS_Q_BIAS,
                ALIGNED_Q, ALIGNED_FQ, PRECISION, INTERPRETED,
            ).to(DTYPE)  # fmt: skip
            if HAS_K_BIAS:
                bias = load_bias(k_bias, columns, stride_kbd, D, D % BLOCK_D == 0)
                shift += tl.sum(lifted.to(tl.float32) * bias[None, :], 1)
            q_latent = dot(lifted, factor, q_latent, PRECISION, INTERPRETED)
    elif ROTARY_DIM > 0:
        q_latent = rotated_query(
            q, q_factor, q_bias, cos, sin, q_norm, queries,
            stride_qm, stride_qr, stride_qfd, stride_qfr, stride_qbd,
            stride_cm, stride_ct, stride_sm, stride_st,
            M, D, R_Q, ROTARY_DIM, ROTARY_PAIR, ONE_ANGLE, HAS_Q_NORM, NORM_EPS,
            BLOCK_M, R_K_PADDED, BLOCK_RQ, QUERIES_FIT, HAS_Q_BIAS,
            ALIGNED_Q, ALIGNED_FQ, PRECISION, INTERPRETED,
        )  # fmt: skip
    else:
        q_latent = lifted_query(
            q, q_factor, q_bias, queries, ranks_k,
            stride_qm, stride_qr, stride_qfd, stride_qfr, stride_qbd,
            M, D, R_Q, BLOCK_M, R_K_PADDED, BLOCK_RQ, QUERIES_FIT, HAS_Q_FACTOR, HAS_Q_BIAS,
            ALIGNED_Q, ALIGNED_FQ, PRECISION, INTERPRETED,
        )  # fmt: skip

    # Inductor hands a number over as float64, in which all that it meets would be computed.
    scale = tl.cast(scale, tl.float32)
    # A q̃ that is rounded anyway takes the scale along; dense queries keep their exact values.
    if SOFTCAP > 0:
        scale = scale * (1 / SOFTCAP)
    elif MASK != "added":
        scale = scale * LOG2E
    if HAS_K_BIAS:
        shift = shift * scale
    in_sink = shift if SOFTCAP == 0 else 0.0
    if IS_SCALED:
        q_latent = q_latent * scale
    q_latent = q_latent.to(DTYPE)

    if SEEKS_MAXIMUM:
        reference = row_maximum(
            first_key, first_free, first_checked, end, q_latent, k, mask, lowest, highest,
            ranks_k, mask_rows, shift, stride_kn, stride_kr, stride_mm, stride_mn, scale, M, N,
            SOFTCAP, HAS_K_BIAS, R_K, R_K_PADDED, MASK,
            IS_CAUSAL, HAS_BEHIND, FITS, IS_SCALED, BLOCK_M, BLOCK_N, None, ALIGNED_K, PRECISION,
            INTERPRETED,
        )  # fmt: skip
    else:
        reference = dot(q_latent, first_tile, None, PRECISION, INTERPRETED)
        if not IS_SCALED:
            reference = reference * scale
        reference = capped(reference, shift, SOFTCAP, HAS_K_BIAS, MASK == "added")
        reference = tl.max(reference, 1)
        # A query that is not a number spoils its scores; it shall not where it sees no key.
        reference = tl.where(reference == reference, reference, 0.0)
    row_sum, latent = stream_keys(
        first_key, first_free, first_checked, end, reference, q_latent,
        k_described if DESCRIBED else k, v_described if DESCRIBED else v, mask, place,
        lowest, highest, ranks_k, ranks_v, mask_rows, shift,
        stride_kn, stride_kr, stride_vn, stride_vr, stride_mm, stride_mn, scale, M, N,
        SOFTCAP, HAS_K_BIAS, R_K, R_V, R_K_PADDED, R_V_PADDED, MASK, IS_CAUSAL, HAS_BEHIND,
        FITS, IS_SCALED, BLOCK_M, BLOCK_N, None, ALIGNED_K, ALIGNED_V, DESCRIBED, PRECISION,
        INTERPRETED,
    )  # fmt: skip
    beside = _exponential_of(of_sink, reference, in_sink, HAS_SINK, MASK == "added")
    _finish(
        latent, row_sum, beside, v_factor, v_bias, out, queries, ranks_v,
        stride_vfd, stride_vfr, stride_vbd, stride_om, stride_od, M,
        HAS_SINK, D_V, R_V, R_V_PADDED, BLOCK_DV, HAS_V_FACTOR, HAS_V_BIAS, HAS_MASK,
        QUERIES_FIT, ALIGNED_FV, PRECISION, INTERPRETED,
    )  # fmt: skip
    if not SEEKS_MAXIMUM:
        LEAST: tl.constexpr = LEAST_SUM_FLOAT16 if IS_FLOAT16 else LEAST_SUM
        MOST: tl.constexpr = MOST_SUM_FLOAT16 if IS_FLOAT16 else MOST_SUM
        is_right = (row_sum > LEAST) & (row_sum < MOST)
        # Those see no key, and their sum is 0.
        if IS_CAUSAL and (MASK == "scanned" or HAS_AHEAD):
            is_right = is_right | (highest < first_shown)
        if HAS_BEHIND:
            is_right = is_right | (lowest >= last_shown)
        # Barriers within the second attempt keep its stores behind those of the first. It is rare:
        # its tiles are half as wide, so that it takes no more registers than the first does.
        NARROW_N: tl.constexpr = BLOCK_N // 2 if BLOCK_N > 16 else BLOCK_N
        if (tl.sum(is_right.to(tl.int32)) < BLOCK_M) & has_keys:
            reference = row_maximum(
                first_key, first_free, first_checked, end, q_latent, k, mask, lowest, highest,
                ranks_k, mask_rows, shift, stride_kn, stride_kr, stride_mm, stride_mn, scale, M, N,
                SOFTCAP, HAS_K_BIAS, R_K, R_K_PADDED, MASK,
                IS_CAUSAL, HAS_BEHIND, FITS, IS_SCALED, BLOCK_M, NARROW_N, 1, ALIGNED_K, PRECISION,
                INTERPRETED,
            )  # fmt: skip
            row_sum, latent = stream_keys(
                first_key, first_free, first_checked, end, reference, q_latent, k, v, mask, place,
                lowest, highest, ranks_k, ranks_v, mask_rows, shift,
                stride_kn, stride_kr, stride_vn, stride_vr, stride_mm, stride_mn, scale, M, N,
                SOFTCAP, HAS_K_BIAS, R_K, R_V, R_K_PADDED, R_V_PADDED, MASK, IS_CAUSAL,
                HAS_BEHIND, FITS, IS_SCALED, BLOCK_M, NARROW_N, 1, ALIGNED_K, ALIGNED_V, False,
                PRECISION, INTERPRETED,
            )  # fmt: skip
            beside = _exponential_of(of_sink, reference, in_sink, HAS_SINK, MASK == "added")
            _finish(
                latent, row_sum, beside, v_factor, v_bias, out, queries, ranks_v,
                stride_vfd, stride_vfr, stride_vbd, stride_om, stride_od, M,
                HAS_SINK, D_V, R_V, R_V_PADDED, BLOCK_DV, HAS_V_FACTOR, HAS_V_BIAS, HAS_MASK,
                QUERIES_FIT, ALIGNED_FV, PRECISION, INTERPRETED,
            )  # fmt: skip
