"""The loops over keys of rank-space attention: what a mask shows, scores, maxima, weighted sums.

Notation as in ``attention_kernel.py``. ``position`` is the first key of a tile, at which ``k``,
``v`` and ``mask`` point; where DESCRIBED, ``k`` and ``v`` are tensor descriptors of [B, H_x, N, R]
instead, and ``place`` is the batch, the head of k and the head of v in them. MASK is "none",
"scanned" (boolean and alike for all queries), "rows" (boolean, differing between queries) or
"added" (floating). A query sees keys from ``lowest`` on where HAS_BEHIND, and to ``highest`` where
IS_CAUSAL; of these, keys of [first_free, first_checked) need no check. ``shift``, where HAS_SHIFT,
is what b_k adds to a row's scores within tanh, in the units of scale · scores.
"""

import triton
import triton.language as tl
from flashsvd_compile.kernels.activations_triton import activate
from flashsvd_compile.kernels.primitives import dot
from flashsvd_compile.kernels.tile_loads import load_tile

LOG2E = tl.constexpr(1.4426950408889634)

# How tensor cores hand a row of scores out: pairs of neighbours to four threads, then again.
LANES = tl.constexpr(4)
PAIR = tl.constexpr(2)

# Keys of which a mask that is alike for all queries is read at once, ahead of the loop.
SCANNED_KEYS = tl.constexpr(1024)


@triton.jit
def load_described(source, batch, head, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """ROWS whole rows of one head from ``row`` on; zero beyond the tensor."""
    return source.load([batch, head, row, 0]).reshape([ROWS, COLUMNS])


@triton.jit
def seen_keys(mask, stride_mn, N):
    """What a mask that is alike for all queries leaves of the keys, as three positions.

    The first key that it shows, the first one after it that it hides, and one past the last that
    it shows; ``(N, N, 0)`` where it shows none.
    """
    first_seen = N
    first_hidden = N
    end = N * 0
    for first_key in tl.range(0, N, SCANNED_KEYS):
        keys = first_key + tl.arange(0, SCANNED_KEYS)
        is_inside = keys < N
        is_seen = tl.load(mask + keys.to(tl.int64) * stride_mn, mask=is_inside, other=False)
        first_seen = tl.minimum(first_seen, tl.min(tl.where(is_seen, keys, N)))
        end = tl.maximum(end, tl.max(tl.where(is_seen, keys + 1, 0)))
        is_hidden = is_inside & (is_seen == 0) & (keys > first_seen)
        first_hidden = tl.minimum(first_hidden, tl.min(tl.where(is_hidden, keys, N)))
    return first_seen, first_hidden, end


@triton.jit
def capped(scores, shift, SOFTCAP: tl.constexpr, HAS_SHIFT: tl.constexpr, NATURAL: tl.constexpr):
    """SOFTCAP · tanh(scores + shift), of base 2 unless ``NATURAL``; the scale has been divided by
    SOFTCAP. ``scores`` as they are where that is 0."""
    if SOFTCAP > 0:
        if HAS_SHIFT:
            scores += shift[:, None]
        CAP: tl.constexpr = SOFTCAP if NATURAL else SOFTCAP * LOG2E
        scores = activate(scores, "tanh", False) * CAP
    return scores


@triton.jit
def _masked_scores(
    position, first_free, first_checked, q_latent, k, mask, place, lowest, highest, keys, ranks_k,
    mask_rows, shift,
    stride_kn, stride_kr, stride_mm, stride_mn, scale, M, N,
    SOFTCAP: tl.constexpr, HAS_SHIFT: tl.constexpr, R_K: tl.constexpr, R_K_PADDED: tl.constexpr,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_BEHIND: tl.constexpr, FITS: tl.constexpr,
    IS_SCALED: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED_K: tl.constexpr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Masked scores [BLOCK_M, BLOCK_N] of the keys from ``position`` on, where k and mask point."""
    keys_left = N - position
    keys_wide = keys.to(tl.int64)
    if MASK == "added" or MASK == "rows":  # ahead of the dot, which hides the load
        mask_tile = load_tile(
            mask, mask_rows, keys_wide[None, :], stride_mm, stride_mn,
            M, keys_left, False, not FITS,
        )  # fmt: skip
    if DESCRIBED:
        key_tile = load_described(k, place[0], place[1], position, BLOCK_N, R_K).T
    else:
        key_tile = load_tile(
            k, ranks_k[:, None], keys_wide[None, :], stride_kr, stride_kn,
            R_K, keys_left, R_K_PADDED > R_K, not FITS, ALIGNED_K, 1,
        )  # fmt: skip
    scores = dot(q_latent, key_tile, None, PRECISION, INTERPRETED)
    if not IS_SCALED:
        scores = scores * scale
    scores = capped(scores, shift, SOFTCAP, HAS_SHIFT, MASK == "added")
    if MASK == "added":
        scores += mask_tile.to(tl.float32)
    elif MASK == "rows":
        scores = tl.where(mask_tile, scores, float("-inf"))
    if IS_CAUSAL or HAS_BEHIND or not FITS:
        is_checked = position + BLOCK_N > first_checked
        if HAS_BEHIND:
            is_checked = is_checked | (position < first_free)
        if is_checked:
            seen = keys < keys_left
            if MASK == "scanned":
                seen = tl.load(mask + keys_wide * stride_mn, mask=seen, other=False)
            seen = seen[None, :]
            if IS_CAUSAL:
                seen = seen & (position + keys[None, :] <= highest[:, None])
            if HAS_BEHIND:
                seen = seen & (position + keys[None, :] >= lowest[:, None])
            scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def row_maximum(
    first_key, first_free, first_checked, end, q_latent, k, mask, lowest, highest, ranks_k,
    mask_rows, shift,
    stride_kn, stride_kr, stride_mm, stride_mn, scale, M, N,
    SOFTCAP: tl.constexpr, HAS_SHIFT: tl.constexpr, R_K: tl.constexpr, R_K_PADDED: tl.constexpr,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_BEHIND: tl.constexpr, FITS: tl.constexpr,
    IS_SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    ALIGNED_K: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The largest score of each query over [first_key, end); 0 where it sees none."""
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    keys = tl.arange(0, BLOCK_N)
    step = tl.full([], BLOCK_N, tl.int64)
    tl.assume(first_key < end)  # an empty loop is a branch around a matmul
    for position in tl.range(first_key, end, BLOCK_N, num_stages=STAGES):
        scores = _masked_scores(
            position, first_free, first_checked, q_latent, k, mask, None, lowest, highest, keys,
            ranks_k, mask_rows, shift, stride_kn, stride_kr, stride_mm, stride_mn, scale, M, N,
            SOFTCAP, HAS_SHIFT, R_K, R_K_PADDED,
            MASK, IS_CAUSAL, HAS_BEHIND, FITS, IS_SCALED, BLOCK_N, ALIGNED_K, False, PRECISION,
            INTERPRETED,
        )  # fmt: skip
        maximum = tl.maximum(maximum, tl.max(scores, 1))
        k += step * stride_kn
        mask += step * stride_mn
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _summed_by_lane(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sums [BLOCK_M, LANES] of what each thread holds of a row: no thread waits for another."""
    by_lane = tl.reshape(tile, [BLOCK_M, BLOCK_N // (LANES * PAIR), LANES, PAIR])
    return tl.sum(tl.sum(by_lane, 3), 1)


@triton.jit
def stream_keys(
    first_key, first_free, first_checked, end, reference, q_latent, k, v, mask, place,
    lowest, highest, ranks_k, ranks_v, mask_rows, shift,
    stride_kn, stride_kr, stride_vn, stride_vr, stride_mm, stride_mn, scale, M, N,
    SOFTCAP: tl.constexpr, HAS_SHIFT: tl.constexpr,
    R_K: tl.constexpr, R_V: tl.constexpr, R_K_PADDED: tl.constexpr, R_V_PADDED: tl.constexpr,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_BEHIND: tl.constexpr, FITS: tl.constexpr,
    IS_SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    ALIGNED_K: tl.constexpr, ALIGNED_V: tl.constexpr, DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Over the keys of [first_key, end): the sum of exp2(score - reference), and that of P_v so
    weighted. ``k``, ``v`` and ``mask`` point at ``first_key``."""
    lane_sums = tl.zeros([BLOCK_M, LANES], tl.float32)
    latent = tl.zeros([BLOCK_M, R_V_PADDED], tl.float32)
    keys = tl.arange(0, BLOCK_N)
    # The bases walk in int64: BLOCK_N rows of a large stride pass 2**31 elements.
    step = tl.full([], BLOCK_N, tl.int64)
    tl.assume(first_key < end)  # an empty loop is a branch around a matmul
    for position in tl.range(first_key, end, BLOCK_N, num_stages=STAGES):
        scores = _masked_scores(
            position, first_free, first_checked, q_latent, k, mask, place, lowest, highest, keys,
            ranks_k, mask_rows, shift, stride_kn, stride_kr, stride_mm, stride_mn, scale, M, N,
            SOFTCAP, HAS_SHIFT, R_K, R_K_PADDED,
            MASK, IS_CAUSAL, HAS_BEHIND, FITS, IS_SCALED, BLOCK_N, ALIGNED_K, DESCRIBED, PRECISION,
            INTERPRETED,
        )  # fmt: skip
        weights = scores - reference[:, None]
        if MASK == "added":
            weights = weights * LOG2E
        weights = tl.exp2(weights)
        summed = weights
        weights = weights.to(q_latent.dtype)
        if not IS_SCALED:
            summed = weights.to(tl.float32)
        lane_sums += _summed_by_lane(summed, BLOCK_M, BLOCK_N)
        if DESCRIBED:
            value_tile = load_described(v, place[0], place[2], position, BLOCK_N, R_V)
        else:
            value_tile = load_tile(
                v, keys.to(tl.int64)[:, None], ranks_v[None, :], stride_vn, stride_vr,
                N - position, R_V, not FITS, R_V_PADDED > R_V, 1, ALIGNED_V,
            )  # fmt: skip
            k += step * stride_kn
            v += step * stride_vn
        latent = dot(weights, value_tile, latent, PRECISION, INTERPRETED)
        mask += step * stride_mn
    return tl.sum(lane_sums, 1), latent
