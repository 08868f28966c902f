"""What several read lies in memory once; everything else of a rewritten graph stays as it was."""

import pytest
import torch
from flashsvd_compile.lowering import written_once
from torch import nn

import flashsvd_compile as fsc
from bench.measure import peak_transient_bytes
from flashsvd_compile import pipeline
from tests.spelled import NormReaders, low_rank

OPTIONS = {"feed_forward": "row_blocks", "chain": "unfused", "siblings": "unfused"}
WIDTH, ROWS = 48, 300


class Layer(nn.Module):
    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        self.norm_first, self.norm = norm_first, nn.LayerNorm(WIDTH)
        self.up, self.down = low_rank(WIDTH, 64), low_rank(64, WIDTH)

    def fed(self, x):
        return self.down(nn.functional.gelu(self.up(x)))

    def forward(self, x):
        return x + self.fed(self.norm(x)) if self.norm_first else self.norm(x + self.fed(x))


pytestmark = pytest.mark.usefixtures("fresh_inference")


def written(model, *inputs, **options) -> int:
    told = fsc.explain(model, *inputs, options=OPTIONS | options)
    (graph,) = told.graphs
    return graph.after.count("aten.as_strided")


def norm_first(depth: int) -> nn.Sequential:
    return nn.Sequential(*(Layer() for _ in range(depth)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_peak_does_not_grow_with_depth(dynamic):
    peaks = []
    for depth in (2, 6):
        torch._dynamo.reset()
        model = norm_first(depth)
        compiled = torch.compile(model, backend="flashsvd", options=OPTIONS, dynamic=dynamic)
        x = torch.randn(ROWS, WIDTH)
        torch.testing.assert_close(compiled(x), model(x))
        peaks.append(peak_transient_bytes(lambda f=compiled, x=x: f(x), "cpu"))
        y = torch.randn(ROWS + 33, WIDTH)
        torch.testing.assert_close(compiled(y), model(y))
    assert peaks[1] - peaks[0] < ROWS * WIDTH * 4  # Inductor alone: three more sums


def test_sums_that_another_sum_reads_are_written():
    assert written(norm_first(4), torch.randn(ROWS, WIDTH)) == 3


def test_a_sum_that_a_norm_alone_reads_is_not():
    model = nn.Sequential(*(Layer(norm_first=False) for _ in range(4)))
    assert written(model, torch.randn(ROWS, WIDTH)) == 0


def test_a_sum_with_a_broadcast_term_is_not():
    class Shifted(Layer):
        def forward(self, x):
            shifted = x + self.norm.bias
            return shifted + self.fed(self.norm(shifted))

    assert written(Shifted(), torch.randn(ROWS, WIDTH)) == 0


def test_nothing_is_done_where_nothing_is_rewritten():
    assert written(norm_first(4), torch.randn(ROWS, WIDTH), feed_forward="unfused") == 0


def test_nothing_is_done_in_training():
    with torch.enable_grad():
        assert written(norm_first(4), torch.randn(ROWS, WIDTH)) == 0


def test_a_sum_that_leaves_the_graph_is_no_view():
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = norm_first(3)

        def forward(self, x):
            kept = []
            for layer in self.layers:
                x = layer(x)
                kept.append(x)
            return kept

    model, x = Kept(), torch.randn(ROWS, WIDTH)
    assert written(model, x) == 2
    compiled = torch.compile(model, backend="flashsvd", options=OPTIONS)
    for ours, plain in zip(compiled(x), model(x), strict=True):
        torch.testing.assert_close(ours, plain)
        assert not ours._is_view()
        assert ours.untyped_storage().nbytes() == plain.untyped_storage().nbytes()


class InPlace(nn.Module):
    """The first sum is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (Layer() for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        again = x.view(-1)
        again.mul_(2)
        return self.third(self.second(x)), x


def test_a_sum_written_in_place_is_right():
    model, x = InPlace(), torch.randn(ROWS, WIDTH)
    compiled = torch.compile(model, backend="flashsvd", options=OPTIONS)
    for ours, plain in zip(compiled(x), model(x), strict=True):
        torch.testing.assert_close(ours, plain)


def test_budgets_count_the_sums_that_are_written(monkeypatch):
    counted = []

    def sums_of_sums(*args):
        counted.append(written_once.sums_of_sums(*args))
        return counted[-1]

    monkeypatch.setattr(pipeline, "sums_of_sums", sums_of_sums)
    options = OPTIONS | {"memory_budget": "1GiB"}
    for model, sums in ((norm_first(4), 3), (InPlace(), 1)):
        assert written(model, torch.randn(ROWS, WIDTH), **options) == sums
        assert len(counted.pop()) == sums


WHOLE = OPTIONS | {"feed_forward": "streamed_whole"}  # reads x itself; on GPUs alone


def whole_on_h100(model, *inputs) -> str:
    """The graph that a GPU would get; nothing runs on one."""
    (graph,) = fsc.explain(model, *inputs, options=WHOLE, device="h100").graphs
    assert graph.after.count("streamed_whole_feed_forward.default(") == len(model.ups)
    return graph.after


@pytest.mark.parametrize("shape", [(3, 100, 32), (300, 32)], ids=["views", "as it is"])
@pytest.mark.parametrize(("count", "library"), [(2, 0), (1, 1), (3, 2)])
def test_what_several_read_is_written_once(count, library, shape):
    after = whole_on_h100(NormReaders(count, library), torch.randn(shape))
    assert after.count("aten.as_strided.default(layer_norm,") == after.count("as_strided.") == 1


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (NormReaders(1), torch.randn(3, 100, 32)),
        (NormReaders(2, norm=nn.Identity()), torch.randn(3, 100, 32)),  # lies in memory
    ],
    ids=["one reader", "an input"],
)
def test_what_is_not_copied_stays_a_formula(model, x):
    assert "as_strided" not in whole_on_h100(model, x)


@pytest.mark.parametrize("of", [lambda x: x[1:4], lambda x: x.view(-1)[5:29].view(3, 8)])
@pytest.mark.parametrize(
    "made",
    [
        lambda x: torch.zeros_like(x) + x,
        lambda x: x * 1,
        lambda x: x.contiguous(),
        lambda x: nn.functional.dropout(x, 0.0, False),
    ],
    ids=["sum", "product", "contiguous", "dropout"],
)
def test_a_compiler_that_drops_the_operator_before_keeps_the_place(of, made):
    """Where ``made`` does nothing, `as_strided` meets a view that begins behind its memory."""

    def model(x):
        y = made(of(x))
        z = torch.as_strided(y, y.shape, y.stride())
        return z @ z.t()

    for x in (torch.randn(6, 8), torch.randn(100)[20:68].view(6, 8)):
        torch.testing.assert_close(torch.compile(model)(x), model(x))
