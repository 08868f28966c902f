"""What a graph holds: buffers, their lives, and the formula of the peak; against the allocator."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flashsvd_compile as fsc
from bench.measure import peak_transient_bytes
from tests.spelled import low_rank

pytestmark = pytest.mark.usefixtures("fresh_inference")

UNFUSED = {"attention": "unfused", "feed_forward": "unfused"}
BUDGETED = {"memory_budget": "1000GiB"}
KIB = 1024


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = low_rank(64, 512, 16), low_rank(512, 64, 16)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.norm(x + self.down(F.gelu(self.up(x))))


def peak(model, *args, **options):
    (found,) = fsc.explain(model, *args, options={**UNFUSED, **options}).peaks
    return found


def test_the_widest_tensor_and_what_lies_beside_it():
    found = peak(FeedForward(), torch.randn(2, 128, 64))
    # The latent, 256 × 16 floats, and the intermediate, whose gelu takes its place.
    assert found.held == {"linear_1": 512 * KIB, "linear": 16 * KIB}
    assert found.transient_bytes == 528 * KIB
    assert (found.node, found.where) == ("linear_1", "up.1")
    assert "linear_1 0.50 MiB" in str(found)


def test_outputs_are_told_apart():
    def run(x):
        y = x @ x.mT
        return y @ y

    found = peak(run, torch.randn(4, 64, 64))
    assert found.transient_bytes == 64 * KIB
    assert found.total_bytes == 128 * KIB


def test_what_several_read_is_written_only_if_that_is_dear():
    def run(a, b, c, d, e, w):
        few, many = a + b, a + b + c + d + e
        return few.sin() @ w, few.cos() @ w, many.sin() @ w, many.cos() @ w

    given = [torch.randn(64, 64) for _ in range(6)]
    found = peak(run, *given)
    names = set(found.held)
    assert any(name.startswith("add") for name in names)  # many; few is added up again
    assert len([name for name in names if name.startswith("add")]) == 1


def test_the_formula_holds_for_all_sizes():
    torch._dynamo.config.automatic_dynamic_shapes = True
    x = torch.randn(2, 128, 64)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    found = peak(FeedForward(), x)
    # 528 floats a token: the intermediate and the latent
    assert found.formula.count("2112") == 1


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 256), {}),
        ((3, 77), UNFUSED),
        ((1, 1500), UNFUSED),
        ((3, 77), {"feed_forward": "row_blocks"}),
        ((1, 1500), {"feed_forward": "row_blocks"}),
    ],
    ids=str,
)
def test_peaks_are_those_of_the_allocator(shape, options):
    model = nn.Sequential(FeedForward(), FeedForward())
    x = torch.randn(*shape, 64)
    options = {**BUDGETED, **options}
    (found,) = fsc.explain(model, x, options=options).peaks
    compiled = torch.compile(model, backend="flashsvd", options=options)
    measured = peak_transient_bytes(lambda: compiled(x), "cpu")
    assert found.total_bytes == pytest.approx(measured, rel=0.05)


def heads_in_front(h):
    return h.view(3, 77, 4, 16).transpose(1, 2).contiguous()


def rotated(h):
    left, right = h.chunk(2, -1)
    return h.cos() * h + torch.cat([-right, left], -1) * h.sin()


@pytest.mark.parametrize(
    ("between", "copies"),
    [
        (F.gelu, 1),  # written over h
        (lambda h: F.gelu(h.view(-1)).view(h.shape), 1),
        (heads_in_front, 2),  # reads h elsewhere than it writes
        (lambda h: h + h.flip(1), 2),
        (lambda h: F.pad(h, (0, 1))[..., 1:], 2),
        (rotated, 2),  # what is concatenated lies side by side on a CPU
    ],
    ids=["in place", "in another shape", "transposed", "flipped", "shifted", "rotated"],
)
def test_a_result_is_written_over_what_is_read_in_place(between, copies):
    def run(x, w, v):
        return (between(x @ w).reshape(3, -1, 16) @ v).sin()

    given = torch.randn(3, 77, 64), torch.randn(64, 64), torch.randn(16, 1)
    found = peak(run, *given)
    compiled = torch.compile(run, backend="flashsvd")
    measured = peak_transient_bytes(lambda: compiled(*given), "cpu")
    assert measured // given[0].nbytes == copies
    assert found.total_bytes == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("batch", [1, 6])
def test_factors_repeated_along_the_batch_are_copied(batch):
    def run(x, factor, w):
        h = x.view(batch, 77, 4, 16).transpose(1, 2) @ factor
        return (h.transpose(1, 2).flatten(2) @ w).sin()

    given = torch.randn(batch, 77, 64), torch.randn(4, 16, 512), torch.randn(2048, 1)
    found = peak(run, *given)
    compiled = torch.compile(run, backend="flashsvd")
    measured = peak_transient_bytes(lambda: compiled(*given), "cpu")
    assert found.total_bytes == pytest.approx(measured, rel=0.02)


def patches(batch, dtype=torch.bfloat16, device="h100", groups=1, place="meta"):
    """MiB that ViT-B/16's patch embedding holds, and something that reads it."""
    with torch.device(place):
        conv = nn.Conv2d(3, 768, 16, 16, groups=groups, dtype=dtype)
        x = torch.empty(batch, 3, 224, 224, dtype=dtype)
    run = nn.Sequential(conv, nn.Flatten(2), nn.Linear(196, 8, dtype=dtype, device=place))
    return fsc.explain(run, x, device=device).peaks[0].transient_bytes / 2**20


@pytest.mark.parametrize(("batch", "mib"), [(8, 14.84), (128, 174.9)])
def test_convolutions_on_a_gpu_hold_copies(batch, mib):
    """As an H100 did: see ``memory/convolution.py``."""
    assert patches(batch) == pytest.approx(mib, rel=0.01)


def test_other_convolutions_hold_what_they_read_and_write():
    result = 8 * 768 * 196 / 2**20
    assert patches(8, torch.float32) == pytest.approx(result * 4, rel=0.1)
    assert patches(8, groups=3) == pytest.approx(result * 2, rel=0.1)
    assert patches(8, device=None, place="cpu") == pytest.approx(result * 2, rel=0.1)
