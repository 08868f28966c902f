"""Feed-forwards streamed whole, and chains streamed, in many spellings and in all but one respect.

The plans are those of a GPU that is pretended; on a CPU their operators run on the library.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flashsvd_compile import explain
from flashsvd_compile.planner.device import Device
from tests.spelled import (
    HIDDEN,
    INTERMEDIATE,
    RANK,
    Attention,
    Spelled,
    assert_same_gradients,
    check,
    hidden_states,
    low_rank,
    no_pass_may_fail,
)
from tests.test_feed_forward_spellings import (
    COMBINES,
    CUTS,
    PROJECTIONS,
    SIZES,
    FeedForward,
    FusedGate,
    Gated,
)

PRETENDED = Device(
    "pretended", "cuda", 227 * 1024, {2: 2e14, 4: 1.9e13}, 3.6e12, 3e12, 4e-6, multiprocessors=132
)
WHOLE = {"compiler": "eager", "attention": "unfused", "feed_forward": "streamed_whole"}
CHAIN = {"compiler": "eager", "attention": "rank_space", "feed_forward": "row_blocks",
         "chain": "streamed"}  # fmt: skip
ONE_WHOLE = ["feed_forward streamed_whole"]
LOW_RANK = [name for name in PROJECTIONS if name != "dense"]


@pytest.fixture(autouse=True)
def _pretended_gpu(monkeypatch):
    monkeypatch.setattr("flashsvd_compile.pipeline.device_for", lambda device: PRETENDED)
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def calls_of(dynamic):
    return [(hidden_states(*size),) for size in (SIZES if dynamic else SIZES[:1])]


# ---- feed-forwards in one kernel ----------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=("static", "dynamic"))
@pytest.mark.parametrize("name", LOW_RANK)
def test_projections(name, dynamic, tmp_path):
    spell = PROJECTIONS[name]
    model = FeedForward(F.gelu, spell(HIDDEN, INTERMEDIATE), spell(INTERMEDIATE, HIDDEN))
    sites = check(model, *calls_of(dynamic), into=tmp_path, dynamic=dynamic, options=WHOLE,
                  found=[*ONE_WHOLE])  # fmt: skip
    assert sites[0]["plan"]["transient_bytes"] == "0"


@pytest.mark.parametrize("dynamic", [False, True], ids=("static", "dynamic"))
@pytest.mark.parametrize(("gate", "up"), [(LOW_RANK[0], "raw_bias"), ("raw", "bias_everywhere")])
def test_gates(gate, up, dynamic, tmp_path):
    model = Gated(COMBINES["swiglu"], PROJECTIONS[gate], PROJECTIONS[up])
    check(model, *calls_of(dynamic), into=tmp_path, dynamic=dynamic, options=WHOLE,
          found=[*ONE_WHOLE])  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
def test_gate_and_up_of_one_projection(cut, tmp_path):
    model = FusedGate(CUTS[cut], COMBINES["geglu"])
    check(model, *calls_of(False), into=tmp_path, options=WHOLE, found=[*ONE_WHOLE])


def test_a_gate_of_another_input(tmp_path):
    class TwoInputs(Gated):
        def forward(self, x, other):
            return self.down(self.combine(self.gate(other), self.up(x)))

    calls = [(hidden_states(), hidden_states())]
    check(TwoInputs(COMBINES["swiglu"]), *calls, into=tmp_path, options=WHOLE, found=[*ONE_WHOLE])


def test_latents_of_one_product(tmp_path):
    """Down-projections that were merged: the latents are its halves, and only they read it."""

    class Merged(nn.Module):
        def __init__(self):
            super().__init__()
            self.u = nn.Linear(HIDDEN, 2 * RANK, bias=False)
            self.gate, self.up = nn.Linear(RANK, INTERMEDIATE), nn.Linear(RANK, INTERMEDIATE)
            self.down = low_rank(INTERMEDIATE, HIDDEN)

        def forward(self, x):
            gate, up = self.u(x).chunk(2, -1)
            return self.down(F.silu(self.gate(gate)) * self.up(up))

    check(Merged(), *calls_of(False), into=tmp_path, options=WHOLE, found=[*ONE_WHOLE])


class Block(nn.Module):
    """Pre-norm layers on a residual stream that other projections read, too."""

    def __init__(self):
        super().__init__()
        self.norm, self.other = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.first, self.second = FeedForward(F.gelu), Gated(COMBINES["swiglu"])

    def forward(self, x):
        normed = self.norm(x)
        x = x + self.first(normed) + self.other(normed)
        return x + self.second(self.norm(x))


@pytest.mark.parametrize("dynamic", [False, True], ids=("static", "dynamic"))
def test_two_layers(dynamic, tmp_path):
    check(Block(), *calls_of(dynamic), into=tmp_path, dynamic=dynamic, options=WHOLE,
          found=ONE_WHOLE * 2)  # fmt: skip


def test_a_site_that_reads_what_another_became(tmp_path):
    """Nothing stands between the first feed-forward's result and the second one's x."""

    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = FeedForward(F.gelu), FeedForward(F.silu)

        def forward(self, x):
            y = self.first(x)
            return y, F.relu(self.second(y))

    check(Stacked(), *calls_of(False), into=tmp_path, options={**WHOLE, "chain": "streamed"})


@pytest.mark.parametrize("change", ["transposed", "strided"])
def test_strides_of_the_input_do_not_matter(change, tmp_path):
    x = hidden_states()
    x = x.transpose(0, 1) if change == "transposed" else x.repeat(1, 1, 2)[..., ::2]
    check(FeedForward(F.gelu), (x,), into=tmp_path, options=WHOLE, found=[*ONE_WHOLE])


class Turned(nn.Module):
    """Gate and up are lifted from one latent, and one of them is turned before they meet."""

    def __init__(self, turns_gate):
        super().__init__()
        self.turns_gate = turns_gate
        self.u = nn.Linear(HIDDEN, RANK, bias=False)
        self.gate, self.up = (nn.Linear(RANK, INTERMEDIATE) for _ in range(2))
        self.down = low_rank(INTERMEDIATE, HIDDEN)

    def forward(self, x):
        latent = self.u(x)
        gate, up = F.silu(self.gate(latent)), self.up(latent)
        if self.turns_gate:
            return self.down(gate.transpose(0, 1) * up)
        return self.down(gate * up.transpose(0, 1))


@pytest.mark.parametrize("turns_gate", [False, True])
def test_rows_of_gate_and_up_that_differ(turns_gate, tmp_path):
    check(Turned(turns_gate), (torch.randn(6, 6, HIDDEN),), into=tmp_path, options=WHOLE,
          found=[*ONE_WHOLE])  # fmt: skip


@pytest.mark.parametrize("options", [WHOLE, CHAIN], ids=("whole", "chain"))
def test_no_gradient_flows_through_what_is_detached(options):
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.u1, self.v1 = nn.Linear(HIDDEN, RANK), nn.Linear(RANK, INTERMEDIATE)
            self.u2, self.v2 = nn.Linear(INTERMEDIATE, RANK), nn.Linear(RANK, HIDDEN)

        def forward(self, x):
            return self.v2(self.u2(F.gelu(self.v1(self.u1(x).detach()))).detach())

    model, x, grads = Detached(), hidden_states(), []
    compiled = torch.compile(model, backend="flashsvd", options=options)
    with torch.enable_grad(), no_pass_may_fail():
        for run in (model, compiled):
            model.zero_grad()
            run(x).square().sum().backward()
            grads.append([p.grad for p in model.parameters()])
    for want, got in zip(*grads, strict=True):
        assert (want is None) == (got is None)
        if want is not None:
            torch.testing.assert_close(got, want)


def test_bfloat16(tmp_path):
    model = Gated(COMBINES["swiglu"]).bfloat16()
    check(model, (hidden_states().bfloat16(),), into=tmp_path, options=WHOLE, found=[*ONE_WHOLE])


@pytest.mark.parametrize("options", [WHOLE, CHAIN], ids=("whole", "chain"))
@pytest.mark.parametrize("gated", [False, True], ids=("plain", "gated"))
def test_gradients(gated, options):
    model = Gated(COMBINES["swiglu"]) if gated else FeedForward(F.gelu)
    model = nn.Sequential(model, nn.LayerNorm(HIDDEN), low_rank(HIDDEN, 41))
    compiled = torch.compile(
        model, backend="flashsvd", options={**options, "compiler": "aot_eager"}
    )
    x = hidden_states()
    with torch.enable_grad(), no_pass_may_fail():
        assert_same_gradients(model, compiled, x)


def test_the_fastest_is_taken_as_predicted():
    site, *_ = explain(FeedForward(F.gelu).bfloat16(), hidden_states().bfloat16()).sites
    assert {rival.lowering for rival in site.plan.rivals} | {site.lowering} == {
        "streamed_whole", "streamed", "row_blocks", "unfused"
    }  # fmt: skip
    assert all(site.plan.seconds <= rival.seconds for rival in site.plan.rivals)


# ---- feed-forwards in all but one respect -------------------------------------------------------


class OneFeedForward(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.u1, self.v1 = nn.Linear(HIDDEN, RANK, bias=False), nn.Linear(RANK, INTERMEDIATE)
        self.u2, self.v2 = nn.Linear(INTERMEDIATE, RANK, bias=False), nn.Linear(RANK, HIDDEN)
        self.dense_up, self.dense_down = nn.Linear(HIDDEN, INTERMEDIATE), nn.Linear(RANK, HIDDEN)
        self.run = run

    def forward(self, x):
        return self.run(self, x)

    def middle(self, latent):
        return self.u2(F.gelu(self.v1(latent)))


def _latent_returned(self, x):
    latent = self.u1(x)
    return self.v2(self.middle(latent)), latent


def _latent_lifted_twice(self, x):
    latent = self.u1(x)
    return self.v2(self.middle(latent)) + self.dense_down(latent)


def _result_returned(self, x):
    latent = self.middle(self.u1(x))
    return self.v2(latent), latent


def _result_lifted_twice(self, x):
    latent = self.middle(self.u1(x))
    return self.v2(latent), self.dense_down(latent)


def _result_normalised(self, x):
    return self.v2(F.layer_norm(self.middle(self.u1(x)), (RANK,)))


def _result_scaled(self, x):
    return self.v2(self.middle(self.u1(x)) * 0.5)


def _latent_scaled(self, x):
    latent = torch.addmm(x.new_zeros(RANK), x.flatten(0, 1), self.u1.weight.t(), alpha=0.5)
    return self.v2(self.middle(latent.unflatten(0, x.shape[:2])))


def _expanded(self, x):
    return self.v2(self.middle(self.u1(x[:1]).expand_as(self.u1(x))))


def _rounded(self, x):
    latent = self.u1(x).bfloat16().type_as(x)
    return self.v2(self.middle(latent))


def _autocast_ends(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        latent = self.u1(x)
    return self.v2(self.middle(latent))


def _autocast(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.v2(self.middle(self.u1(x)))


def _written_after(self, x):
    x = x.clone()
    y = self.v2(self.middle(self.u1(x)))
    x[:, 0] = 0.0
    return y + x.sum()


NOT_WHOLE = {
    "latent_returned": (_latent_returned, "latent_has_other_user", "read by output"),
    "latent_lifted_twice": (_latent_lifted_twice, "latent_has_other_user", "read by linear"),
    "result_returned": (_result_returned, "latent_has_other_user", "read by output"),
    "result_lifted_twice": (_result_lifted_twice, "latent_has_other_user", "read by linear"),
    "result_normalised": (_result_normalised, "no_low_rank_operand", "lifted by no factor"),
    "result_scaled": (_result_scaled, "op_not_carried", "scaled"),
    "latent_scaled": (_latent_scaled, "op_not_carried", "scaled product"),
    "rounded": (_rounded, "dtype", "bfloat16"),
    "autocast_ends": (_autocast_ends, "region_crossed", "autocast or grad mode changes"),
    "autocast": (_autocast, "dtype", "float32"),
    "written_after": (_written_after, "no_low_rank_operand", "no product with a factor"),
    "dense_up": (lambda self, x: self.v2(self.u2(F.gelu(self.dense_up(x)))),
                 "no_low_rank_operand", "no product with a factor"),
    "no_last_factor": (lambda self, x: self.middle(self.u1(x)), "no_low_rank_operand", "lifted"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_WHOLE)
def test_not_whole(name, tmp_path):
    run, code, observed = NOT_WHOLE[name]
    (site,) = check(OneFeedForward(run), (hidden_states(),), into=tmp_path, options=WHOLE)
    assert site["lowering"] == "unfused"
    assert (site["reason"]["code"], True) == (code, observed in site["reason"]["observed"]), site
    assert site["reason"]["node"]


def test_an_expanded_latent_stays_right(tmp_path):
    check(OneFeedForward(_expanded), (hidden_states(),), into=tmp_path, options=WHOLE)


def test_ranks_beyond_a_tile_are_not_whole(tmp_path):
    model = FeedForward(F.gelu, low_rank(300, 900, 260), low_rank(900, 300, 8))
    (site,) = check(model, (hidden_states(hidden=300),), into=tmp_path, options=WHOLE)
    assert (site["lowering"], site["reason"]["code"]) == ("unfused", "sram")


# ---- chains -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=("static", "dynamic"))
@pytest.mark.parametrize("name", LOW_RANK)
def test_chains(name, dynamic, tmp_path):
    model = nn.Sequential(nn.ReLU(), PROJECTIONS[name](HIDDEN, 41))
    check(model, *calls_of(dynamic), into=tmp_path, dynamic=dynamic, options=CHAIN,
          found=["chain streamed"])  # fmt: skip


def test_a_chain_that_reads_what_another_became(tmp_path):
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = low_rank(HIDDEN, 41), low_rank(41, HIDDEN)

        def forward(self, x):
            y = self.first(x)
            return y, self.second(y)

    sites = check(Stacked(), *calls_of(False), into=tmp_path, options=CHAIN)
    assert "chain streamed" in {f"{s['kind']} {s['lowering']}" for s in sites}


def test_the_projection_after_attention(tmp_path):
    model = Attention()
    model.out = low_rank(24, HIDDEN)
    x = hidden_states()
    check(model, (x, x), into=tmp_path, options=CHAIN,
          found=["attention rank_space", "chain streamed"])  # fmt: skip


def test_a_feed_forwards_latents_are_not_made_twice(tmp_path):
    sites = check(FeedForward(F.gelu), *calls_of(False), into=tmp_path, options=CHAIN,
                  found=["feed_forward row_blocks", "chain unfused"])  # fmt: skip
    reason = sites[1]["reason"]
    assert reason["code"] == "latent_has_other_user"
    assert "belongs to another site" in reason["observed"]


def _chain_latent_returned(self, x):
    latent = x @ self.u
    return latent @ self.v, latent


def _chain_per_head(self, x):
    latent = torch.einsum("bmi,hir->bhmr", x, self.heads_u)
    return torch.einsum("bhmr,hro->bhmo", latent, self.heads_v)


def _chain_weighted(self, x):
    return torch.addmm(self.b, (x @ self.u).flatten(0, 1), self.v, alpha=2.0)


NOT_STREAMED = {
    "latent_returned": (_chain_latent_returned, "latent_has_other_user", "read by output"),
    "per_head": (_chain_per_head, "bad_layout", "part by token"),
    "weighted": (_chain_weighted, "op_not_carried", "scaled"),
    "rounded": (lambda self, x: (x @ self.u).bfloat16().type_as(x) @ self.v, "dtype", "bfloat16"),
}


@pytest.mark.parametrize("name", NOT_STREAMED)
def test_not_streamed(name, tmp_path):
    run, code, observed = NOT_STREAMED[name]
    model = Spelled(run, u=(HIDDEN, RANK), v=(RANK, 41), b=(41,), heads_u=(3, HIDDEN, RANK),
                    heads_v=(3, RANK, 11))  # fmt: skip
    sites = check(model, (hidden_states(),), into=tmp_path, options=CHAIN)
    assert [site["lowering"] for site in sites] == ["unfused"]
    reason = sites[0]["reason"]
    assert (reason["code"], True) == (code, observed in reason["observed"]), reason


@pytest.mark.parametrize(
    ("rank", "code"), [(20, "rank_too_large"), (257, "sram")], ids=["no_gain", "no_tile"]
)
def test_ranks_of_chains(rank, code, tmp_path):
    hidden = 30 if rank < 30 else 900
    model = low_rank(hidden, hidden + 1, rank)
    (site,) = check(model, (hidden_states(hidden=hidden),), into=tmp_path, options=CHAIN)
    assert (site["lowering"], site["reason"]["code"]) == ("unfused", code)
