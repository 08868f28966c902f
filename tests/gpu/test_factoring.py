"""Dense models factored while they are compiled, on the device, under CUDA graphs, too."""

import pytest
import torch
from torch import nn

from tests.factoring.explicit import explicit, told_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("fresh_inference"),
]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(256, 256) for _ in "qkvo")
        self.up, self.down = nn.Linear(256, 1024), nn.Linear(1024, 256)

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (4, 64)).transpose(1, 2) for p in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(x)))


@pytest.mark.parametrize("graphs", [False, True], ids=["launches", "cuda_graphs"])
def test_right_and_seen_to_change(graphs):
    options = {"keep": 0.4, "triton.cudagraphs": graphs}
    model = Layer().to("cuda", torch.bfloat16)
    x = torch.randn(4, 256, 256, device="cuda", dtype=torch.bfloat16)
    run = torch.compile(model, backend="flashsvd", options=options)
    for _ in range(2):
        low = explicit(model, told_of(model, x, options=options)).to("cuda")
        exact = low.double()(x.double())
        budget = 2 * (low.bfloat16()(x).double() - exact).abs().max() + 0.02 * exact.abs().max()
        for _ in range(4):  # warm-up, recording, replay
            assert (run(x).double() - exact).abs().max() <= budget
        model.up.weight.copy_(torch.randn_like(model.up.weight) / 16)
