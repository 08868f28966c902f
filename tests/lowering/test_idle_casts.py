"""Conversions that convert nothing are gone; all others stay, and so does what is written where."""

import pytest
import torch
from torch import nn

import flashsvd_compile as fsc
from tests.lowering.test_written_once import OPTIONS, ROWS, WIDTH, Layer, written

pytestmark = pytest.mark.usefixtures("fresh_inference")


class Converting(Layer):
    """Its residual goes on as what the norm's conversion gave, as Llama's does."""

    def forward(self, x):
        x = x.to(torch.float32)
        return x + self.fed(self.norm(x))


def after(fn, *inputs, **options) -> str:
    (graph,) = fsc.explain(fn, *inputs, options=options or None).graphs
    return graph.after


def test_sums_behind_them_are_seen_as_sums():
    model = nn.Sequential(*(Converting() for _ in range(4)))
    assert written(model, torch.randn(ROWS, WIDTH)) == 3


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.to(torch.float32),
        lambda x: x.float(),
        lambda x: x.to("cpu"),
        lambda x: x.to(torch.zeros(1)),
        lambda x: x.to(torch.float32, memory_format=torch.preserve_format),
    ],
)
def test_idle_ones_are_dropped(convert):
    code = after(lambda x: convert(x * 2) + 1, torch.randn(3, 4))
    assert "aten.to." not in code


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.to(torch.float64),
        lambda x: x.to(torch.float32, copy=True),
        lambda x: x.to(torch.float32, memory_format=torch.channels_last),
    ],
)
def test_others_stay(convert):
    code = after(lambda x: convert(x * 2) + 1, torch.randn(2, 3, 4, 5))
    assert "aten.to." in code


def test_what_is_written_into_one_is_written_into_its_source():
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, x):
            x = self.layer(x)
            same, other = x.float(), x.to(torch.float32, copy=True)
            same.mul_(2)
            other.add_(1)
            return x, same, other, self.layer(same)

    model, x = Written(), torch.randn(ROWS, WIDTH)
    compiled = torch.compile(model, backend="flashsvd", options=OPTIONS)
    got = compiled(x)
    torch.testing.assert_close(got, model(x))
    assert got[0].data_ptr() == got[1].data_ptr() != got[2].data_ptr()


def test_under_autocast_dtypes_are_those_of_eager():
    model, x = nn.Sequential(*(Converting() for _ in range(2))), torch.randn(ROWS, WIDTH)

    def run(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x), model[0].up(x).to(torch.bfloat16)

    compiled = torch.compile(run, backend="flashsvd", options=OPTIONS)
    for got, want in zip(compiled(x), run(x), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0.03, atol=0.03)
