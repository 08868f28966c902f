"""What operators and kernels reach of a device's rates. Numbers that were fitted, and to what.

They come from the times of 147 feed-forward sites with every lowering that each can have, 16 to
1224 ranks, 256 to 65536 rows, hidden sizes of 384 to 4096, gated and not, bfloat16, on an H100 80GB
HBM3 with torch 2.11.0 and triton 3.6.0, 2026-11-27 (`python -m bench.choices --only feed_forward`,
`python -m bench.fit_efficiency`). Those of chains and siblings were read off 47 chains and 30
groups of siblings (`python -m bench.chain`, `.siblings` and `.choices`; same GPU and versions).
Shares of a device's rates carry over to another; seconds do as far as clocks are alike.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LoopEfficiency:
    """Of a kernel whose programs each walk one axis, a tile a step.

    A step takes a program at least ``step_s`` (``gate_s`` more with a gate) and ``macs`` times what
    the macs of its tiles take at a multiprocessor's full rate: that is what few programs wait for.
    Many, which share the multiprocessors, take ``shared_elements_s`` for each element of the
    intermediate and ``shared_macs`` times the macs. Ranks that are no multiple of 16 are masked:
    ``unaligned_s`` for each element of a factor, ``shared_unaligned_s`` where many programs do.
    Tiles of fewer rows than a warpgroup's take their macs ``few_rows`` times.
    """

    step_s: float
    gate_s: float
    macs: float
    unaligned_s: float
    shared_elements_s: float
    shared_macs: float
    shared_unaligned_s: float
    few_rows: float


@dataclass(frozen=True)
class Efficiency:
    """Of library matmuls and of kernels.

    ``matmul``: share of `Device.macs_per_s` that a large matmul reaches; one of fewer tiles than
    multiprocessors reaches that of as many, to the power ``few_tiles``. ``attention``: of attention
    kernels and what surrounds them. ``matmul_step_s``: seconds
    for each element of the contracted axis, at least. ``memory``: share of `Device.bytes_per_s`.
    ``lift``, ``lift_gated``: macs of the kernel that lifts and activates, of `matmul`'s;
    ``activated_s``, ``gated_s``: its seconds for each element; ``lift_step_s``: for each rank.
    ``launch_s``: of a kernel that Inductor launches, measured on the device alone.
    ``many_ranks``: what macs of ranks beyond those that stay on chip take, against others.
    ``outer_step_s``, ``outer_macs``, ``outer_shared_macs``: of the loops over x and y of a
    feed-forward streamed whole.
    ``chain_factor_s``, ``chain_rows_s``: of a step of a streamed chain, for each element of its
    factor's tile and of its rows; ``chain_macs``: what its macs take of a full rate where programs
    share the multiprocessors. ``merged``: share of `matmul`'s rate that the one launch of siblings
    reaches; ``merged_step_s``: for each element of the contracted axis.
    ``operator_s``: of the host, for an operator of ours that is no launch, where that counts.
    """

    launch_s: float
    matmul: float
    attention: float
    few_tiles: float
    matmul_step_s: float
    memory: float
    lift: float
    lift_gated: float
    activated_s: float
    gated_s: float
    lift_step_s: float
    many_ranks: float
    outer_step_s: float
    outer_macs: float
    outer_shared_macs: float
    chain_factor_s: float
    chain_rows_s: float
    chain_macs: float
    merged: float
    merged_step_s: float
    operator_s: float
    streamed: LoopEfficiency
    whole: LoopEfficiency


GPU = Efficiency(
    launch_s=3.61e-6,
    matmul=0.933,
    attention=0.5,
    few_tiles=0.348,
    matmul_step_s=9.81e-10,
    memory=0.864,
    lift=1.57,
    lift_gated=1.17,
    activated_s=1.45e-12,
    gated_s=2.61e-12,
    lift_step_s=2.71e-8,
    many_ranks=1.97,
    outer_step_s=1.30e-6,
    outer_macs=0.941,
    outer_shared_macs=3.11,
    chain_factor_s=2.4e-11,
    chain_rows_s=6e-11,
    chain_macs=2.0,
    merged=0.6,
    merged_step_s=3e-9,
    operator_s=0.0,
    streamed=LoopEfficiency(
        step_s=7.97e-7,
        gate_s=4.48e-7,
        macs=0.384,
        unaligned_s=7.63e-11,
        shared_elements_s=2.3e-13,
        shared_macs=1.83,
        shared_unaligned_s=4.71e-11,
        few_rows=3.74,
    ),
    whole=LoopEfficiency(
        step_s=4.58e-7,
        gate_s=1.88e-7,
        macs=0.412,
        unaligned_s=6.79e-12,
        shared_elements_s=1.36e-10,
        shared_macs=0.264,
        shared_unaligned_s=8.43e-12,
        few_rows=15.7,
    ),
)

# Rates of a CPU are measured as they are reached; it has none of the kernels. An operator took 0.4
# ms of an EPYC's core (torch 2.13.0, 2026-11-27): Python, and the dispatch of what it calls.
CPU = replace(
    GPU,
    launch_s=5e-6,
    matmul=1.0,
    attention=1.0,
    matmul_step_s=0.0,
    memory=1.0,
    operator_s=4e-4,
)
