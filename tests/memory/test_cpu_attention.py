"""What torch's attention on a CPU holds beside its operands and output, against its allocations."""

import pytest
import torch
import torch.nn.functional as F

from bench.measure import peak_transient_bytes
from flashsvd_compile.memory.cpu_attention import flash_scratch_bytes

pytestmark = pytest.mark.usefixtures("fresh_inference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "rows", "keys", "width"),
    [(2, 3, 20, 20, 8), (1, 2, 191, 700, 16), (2, 1, 333, 100, 33), (1, 4, 1024, 1024, 8)],
)
def test_as_allocated(batch, heads, rows, keys, width, dtype):
    q, k = (torch.randn(batch, heads, n, width, dtype=dtype) for n in (rows, keys))
    held = peak_transient_bytes(lambda: F.scaled_dot_product_attention(q, k, k), "cpu")
    assert held - q.nbytes == flash_scratch_bytes(batch, heads, rows, keys, width, dtype)
