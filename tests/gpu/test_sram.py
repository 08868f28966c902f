"""What planners foresee of shared memory, over random calls compiled for the GPU at hand."""

import os

import pytest
import torch
from flashsvd_compile.kernels.devices import generation_of

from tests.kernels.test_sram import foreseen, is_foreseen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CALLS = {
    "attention": 100,
    "feed_forward": 80,
    "feed_forward_whole": 40,
    "chain": 40,
    "siblings": 30,
    "lifted_activation": 20,
}


# Of calls, the share of which more may be foreseen than asked: tiles of a table, but with another
# number of stages, where Triton's allocator finds a better packing than the program's order tells.
MOST_BEYOND = 0.03


@pytest.mark.parametrize("kernel", CALLS)
def test_shared_memory_is_foreseen(kernel):
    generation = generation_of(torch.device("cuda:0"))
    found = foreseen(
        CALLS[kernel], kernel, "--generation", generation, jobs=min(16, os.cpu_count() or 1)
    )
    assert len(found) == CALLS[kernel]
    assert [case for case in found if case["foreseen_bytes"] < case["taken_bytes"]] == []
    assert sum(not is_foreseen(case) for case in found) <= MOST_BEYOND * len(found)
