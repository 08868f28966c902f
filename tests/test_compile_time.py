"""The passes' work grows with the graph, not with its square: counted in calls, which never flake.

Three depths n, 2n, 4n: what the last 2n blocks add must be twice what the n before them added, so
that the fixed part of the work, which is large, hides nothing.
"""

import cProfile
import gc

import pytest
import torch

from bench.deep_graph import deep_graph
from flashsvd_compile.options import Options
from flashsvd_compile.pipeline import rewrite
from tests.spelled import OPTIONS

BLOCKS = 4


def calls_of_rewrite(blocks: int, dynamic: bool) -> int:
    """Function calls of all passes over a graph of ``blocks`` blocks, torch's and sympy's too."""
    graph = deep_graph(blocks, dynamic=dynamic)
    options = Options.parse(OPTIONS)
    profile = cProfile.Profile()
    gc.collect()
    gc.disable()  # finalisers are calls, too
    try:
        profile.enable()
        rewritten = rewrite(graph.gm, graph.example_inputs, options)
        profile.disable()
    finally:
        gc.enable()
    fused = [plan for plan in rewritten.plans if plan.lowering in ("rank_space", "row_blocks")]
    assert len(fused) == 2 * blocks
    return sum(entry.callcount for entry in profile.getstats())


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@torch.no_grad()
def test_work_is_linear_in_blocks(dynamic):
    calls_of_rewrite(BLOCKS, dynamic)  # fills torch's and sympy's caches
    few, more, most = (calls_of_rewrite(n * BLOCKS, dynamic) for n in (1, 2, 4))
    assert most - more <= 2.02 * (more - few)  # 2.000 as it is; one scan a site makes it 2.04
    assert most <= 4.4 * few
