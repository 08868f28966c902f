"""``memory_budget`` through the public door: kept, right, refused with what is possible."""

import re

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import flashsvd_compile as fsc
from bench.measure import peak_transient_bytes
from flashsvd_compile.memory.measured import measured_peak
from flashsvd_compile.options import OptionsError
from flashsvd_compile.planner.budget import BudgetError
from tests.spelled import assert_as_good_as_eager, low_rank

pytestmark = pytest.mark.usefixtures("fresh_inference", "two_threads")

HEADS, HEAD_DIM, RANK, HIDDEN = 4, 32, 8, 128


@pytest.fixture
def two_threads():
    """What library attention holds grows with the threads, and with it the least budget."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(HIDDEN, HEADS * RANK, bias=False) for _ in "qkv")
        self.factors = nn.ParameterList(torch.randn(HEADS, RANK, HEAD_DIM) / 3 for _ in "qkv")
        self.up, self.back = low_rank(HIDDEN, 1024), low_rank(1024, HIDDEN)

    def forward(self, x):
        x = x + self.mixed(x)
        return x + self.back(nn.functional.gelu(self.up(x)))

    def mixed(self, x):
        latents = [u(x).unflatten(-1, (HEADS, RANK)).transpose(1, 2) for u in self.down]
        q, k, v = (p @ f for p, f in zip(latents, self.factors, strict=True))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).flatten(2)


def model() -> nn.Module:
    return nn.Sequential(Layer(), Layer())


UNFUSED = {"attention": "unfused", "feed_forward": "unfused", "chain": "unfused"}


def free_bytes(x) -> int:
    """Unfused: what is fastest, and so what is planned freely, is not the same on every day."""
    return fsc.explain(model(), x, options=UNFUSED).peaks[0].transient_bytes


def compiled(inner, budget, **options):
    options["memory_budget"] = budget
    return torch.compile(inner, backend="flashsvd", options=options)


@pytest.mark.parametrize(
    ("shape", "share", "blocks"),
    [
        ((8, 128), 0.5, None),
        ((8, 128), 0.3, (2, HEADS)),
        ((3, 333), 0.3, (1, HEADS)),
        ((1, 700), 0.4, (1, 2)),
        ((1, 1024), 0.5, None),
    ],
    ids=str,
)
def test_kept_and_right(shape, share, blocks):
    inner, x = model(), torch.randn(*shape, HIDDEN)
    budget = int(free_bytes(x) * share)
    told = fsc.explain(inner, x, options={"memory_budget": budget})
    assert told.peaks[0].transient_bytes <= budget
    (fastest,) = fsc.explain(inner, x).peaks
    changed = any(s.reason.code.value == "memory_budget" for s in told.sites)
    assert changed == (fastest.transient_bytes > budget)
    planned = [s.plan.blocks for s in told.sites if s.kind == "attention"]
    assert {b and (b.batch, b.heads) for b in planned} == {blocks}
    run = compiled(inner, budget)
    assert_as_good_as_eager(inner, run, (x,))
    # At the worst moment the output may not exist yet: the total tells more than the budget.
    held = peak_transient_bytes(lambda: run(x), "cpu")
    assert held == pytest.approx(told.peaks[0].total_bytes, rel=0.01)


class NormFirst(Layer):
    """Its attention reads what nothing else does, a norm."""

    def mixed(self, x):
        return super().mixed(nn.functional.layer_norm(x, (HIDDEN,)))


def test_what_attention_in_blocks_makes_q_k_and_v_of_is_held_once():
    inner, x = NormFirst(), torch.randn(8, 128, HIDDEN)
    budget = 3 * x.nbytes + 100 * 2**10  # the feed-forward in blocks of rows takes three of x
    told = fsc.explain(inner, x, options={"memory_budget": budget})
    (blocks,) = (s.plan.blocks for s in told.sites if s.kind == "attention")
    assert blocks is not None
    assert set(blocks.entries) == set("qkv")
    run = compiled(inner, budget)
    assert_as_good_as_eager(inner, run, (x,))
    held = peak_transient_bytes(lambda: run(x), "cpu")
    assert held == pytest.approx(told.peaks[0].total_bytes, rel=0.01)


def test_attention_in_blocks_of_the_batch():
    config = BertConfig(
        hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=256,
        vocab_size=100,
    )  # fmt: skip
    bert = BertModel(config, add_pooling_layer=False).eval()
    fsc.compress_(bert, keep=0.4)
    ids = torch.randint(0, 100, (8, 96))
    mask = (torch.arange(96) < torch.randint(40, 97, (8, 1))).long()
    options = {"compiler": "eager", "attention": "rank_space", "feed_forward": "row_blocks"}
    free = fsc.explain(bert, ids, mask, options=options).peaks[0].transient_bytes
    options["memory_budget"] = int(free * 0.7)
    told = fsc.explain(bert, ids, mask, options=options)
    blocks = [s.plan.blocks for s in told.sites if s.kind == "attention"]
    assert all(b is not None and b.batch < 8 and set(b.entries) == set("qkv") for b in blocks)
    run = torch.compile(bert, backend="flashsvd", options=options)
    expected = bert(ids, attention_mask=mask)[0]
    torch.testing.assert_close(run(ids, attention_mask=mask)[0], expected, rtol=1e-4, atol=1e-4)


def test_no_pressure_changes_nothing():
    x = torch.randn(4, 64, HIDDEN)
    free, budgeted = (
        fsc.explain(model(), x, options=options) for options in ({}, {"memory_budget": "1GiB"})
    )
    assert [s.lowering for s in free.sites] == [s.lowering for s in budgeted.sites]


def test_refused_with_what_is_possible():
    x = torch.randn(4, 64, HIDDEN)
    with pytest.raises(Exception, match="BudgetError") as error:
        compiled(model(), "10KiB")(x)
    told = str(error.value)
    assert "memory_budget is 0.01 MiB" in told
    assert " MiB, at " in told
    (enough,) = re.findall(r'within memory_budget="(\d+)MiB"', told)
    compiled(model(), f"{enough}MiB", compiler="eager")(x)


class RotaryLayer(NormFirst):
    """Turned queries and keys are read at full width, keys by two heads each."""

    def mixed(self, x):
        x = nn.functional.layer_norm(x, (HIDDEN,))
        latents = [u(x).unflatten(-1, (HEADS, RANK)).transpose(1, 2) for u in self.down]
        q, k, v = (p @ f for p, f in zip(latents, self.factors, strict=True))
        q, k = (h + torch.cat([-h[..., 16:], h[..., :16]], -1).sin() for h in (q, k[:, ::2]))
        k, v = (h[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for h in (k, v[:, ::2]))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("depth", [2, 5])
@pytest.mark.parametrize("layer", [Layer, NormFirst, RotaryLayer])
def test_the_least_that_is_told_is_what_is_held_then(layer, depth):
    """Residual sums that wait for later layers, too: the least does not grow with their number."""
    inner, x = nn.Sequential(*(layer() for _ in range(depth))), torch.randn(3, 333, HIDDEN)
    with pytest.raises(BudgetError) as error:
        fsc.explain(inner, x, options={"memory_budget": "1KiB"})
    least = error.value.least_bytes
    (told,) = fsc.explain(inner, x, options={"memory_budget": least}).peaks
    run = compiled(inner, least)
    assert_as_good_as_eager(inner, run, (x,))
    measured = measured_peak(lambda: run(x), "cpu")
    assert measured.transient_bytes <= least
    assert measured.transient_bytes == pytest.approx(least, rel=0.15)
    assert measured.total_bytes == pytest.approx(told.total_bytes, rel=0.15)


def test_refused_for_what_library_attention_holds():
    x = torch.randn(1, 1024, HIDDEN)
    with pytest.raises(BudgetError, match=r"at scaled_dot_product_attention\S* in \d: scratch"):
        fsc.explain(model(), x, options={"memory_budget": int(free_bytes(x) * 0.4)})


def test_refused_in_training():
    with torch.enable_grad(), pytest.raises(Exception, match="plans inference"):
        compiled(model(), "1GiB")(torch.randn(4, 64, HIDDEN, requires_grad=True))


def test_larger_calls_are_planned_anew():
    inner = model()
    budget = int(free_bytes(torch.randn(4, 128, HIDDEN)) * 0.7)
    run = compiled(inner, budget)
    counters = torch._dynamo.utils.counters["stats"]
    torch._dynamo.config.automatic_dynamic_shapes = True
    for batch in (2, 3, 4):
        x = torch.randn(batch, 128, HIDDEN)
        assert_as_good_as_eager(inner, run, (x,))
        assert peak_transient_bytes(lambda x=x: run(x), "cpu") - x.nbytes <= budget
    graphs = counters["unique_graphs"]
    run(torch.randn(2, 128, HIDDEN))
    assert counters["unique_graphs"] == graphs


def test_told_sizes_hold_for_one_graph():
    torch._dynamo.utils.counters.clear()
    inner = model()
    run = torch.compile(
        inner,
        backend="flashsvd",
        dynamic=True,
        options={
            "compiler": "eager",
            "memory_budget": "1GiB",
            "max_batch": 16,
            "max_length": 256,
        },
    )
    for batch, length in ((2, 32), (16, 256), (5, 100)):
        assert_as_good_as_eager(inner, run, (torch.randn(batch, length, HIDDEN),))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    run(torch.randn(17, 256, HIDDEN))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"memory_budget": -1}, "at least one byte"),
        ({"memory_budget": "12 MeB"}, "no unit 'MeB'; the nearest is 'MB'"),
        ({"memory_budget": "much"}, "nearest"),
        ({"max_batch": 0}, "a whole number of at least 1"),
        ({"max_length": 2.5}, "a whole number of at least 1"),
        ({"max_batch": True}, "a whole number of at least 1"),
    ],
)
def test_nonsense(given, told):
    with pytest.raises(OptionsError, match=re.escape(told)):
        fsc.Options.parse(given)
