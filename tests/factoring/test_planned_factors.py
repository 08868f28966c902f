"""Dense models through ``torch.compile(backend="flashsvd", options={"keep": ...})``."""

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    ViTConfig,
    ViTModel,
)

from flashsvd_compile import compress_, explain
from tests.factoring.explicit import KEEP, codes, explicit, shapes, told_of
from tests.spelled import (
    ATTENDS,
    FUSED_CUTS,
    HEAD_DIM,
    HEAD_LAYOUTS,
    HEADS,
    HIDDEN,
    Attention,
    FusedAttention,
    assert_as_good_as_eager,
    attention_inputs,
    hidden_states,
    low_rank,
    no_pass_may_fail,
)

pytestmark = pytest.mark.usefixtures("fresh_inference")


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(30, 60), nn.Linear(60, 30, bias=False)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention("dense", "dense", "dense"), FeedForward()

    def forward(self, x):
        return self.mlp(self.attention(x, x))


PER_HEAD = ("per_head", HEADS, 3)  # 0.5 · 8·30 / (8 + 30)


def compiled(model, options=KEEP, **kwargs):
    return torch.compile(model, backend="flashsvd", options=options, **kwargs)


def check(model, *calls, options=KEEP, **kwargs):
    """Runs all calls of one compiled model against the explicitly factored one."""
    told = told_of(model, *calls[0], options=options)
    run, low = compiled(model, options, **kwargs), explicit(model, told)
    with no_pass_may_fail():
        for args in calls:
            assert_as_good_as_eager(low, run, args)
    return told


def attention_of(model, *args, options=KEEP):
    """Lowering and ranks of the only attention."""
    (site,) = [s for s in explain(model, *args, options=options).sites if s.kind == "attention"]
    return site.lowering, site.to_dict()["plan"]["ranks"]


# ---- right, and where the attention wants it -----------------------------------------------------


def test_a_layer():
    model, x = Layer(), hidden_states()
    told = check(model, (x,))
    assert shapes(told) == {
        "attention.q": PER_HEAD,
        "attention.k": PER_HEAD,
        "attention.v": PER_HEAD,
        "attention.out": ("matrix", 1, 6),
        "mlp.up": ("matrix", 1, 10),
        "mlp.down": ("matrix", 1, 10),
    }
    assert attention_of(model, x) == ("rank_space", {"q": "3", "k": "3", "v": "3"})
    sites = {s.kind: s.lowering for s in explain(model, x, options=KEEP).sites}
    assert sites["feed_forward"] == "row_blocks"


@pytest.mark.parametrize("layout", HEAD_LAYOUTS)
def test_heads_are_read_off_any_layout(layout):
    model, args = Attention("dense", "dense", "dense", layout), attention_inputs("sdpa")
    told = check(model, args)
    assert [shapes(told)[name] for name in "qkv"] == [PER_HEAD] * 3
    assert attention_of(model, *args)[0] == "rank_space"


@pytest.mark.parametrize("attend", ATTENDS)
def test_heads_are_read_off_any_attention(attend):
    model, args = Attention("dense", "dense", "dense", attend=attend), attention_inputs(attend)
    told = check(model, args)
    assert [shapes(told)[name] for name in "qkv"] == [PER_HEAD] * 3
    assert attention_of(model, *args)[0] == "rank_space"


@pytest.mark.parametrize("cut", FUSED_CUTS)
def test_heads_of_a_fused_projection(cut):
    model, x = FusedAttention("sequential", cut), hidden_states()
    model.qkv = nn.Linear(HIDDEN, 3 * HEADS * HEAD_DIM)
    assert shapes(check(model, (x,))) == {"qkv": ("per_head", 3 * HEADS, 3)}
    assert attention_of(model, x) == ("rank_space", {"q": "3", "k": "3", "v": "3"})


def test_a_cut_through_heads_leaves_one_matrix():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(HIDDEN, 3 * HEADS * HEAD_DIM + HEAD_DIM // 2)

        def forward(self, x):
            parts = self.qkv(x)[..., HEAD_DIM // 2 :].chunk(3, dim=-1)
            q, k, v = (p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in parts)
            return nn.functional.scaled_dot_product_attention(q, k, v)

    told = check(Shifted(), (hidden_states(),))
    assert shapes(told)["qkv"][:2] == ("matrix", 1)


def rotated(x):
    """A rotation of halves, as RoPE has it."""
    left, right = x.chunk(2, dim=-1)
    angle = torch.arange(x.size(-2) * x.size(-1), dtype=x.dtype).view(x.shape[-2:])
    return x * angle.cos() + torch.cat((-right, left), -1) * angle.sin()


class Grouped(nn.Module):
    """Grouped heads; keys that are rotated, or normalised head by head, and queries as they are."""

    def __init__(self, between) -> None:
        super().__init__()
        self.q = nn.Linear(HIDDEN, 2 * HEADS * HEAD_DIM)
        self.k, self.v = (nn.Linear(HIDDEN, HEADS * HEAD_DIM) for _ in "kv")
        self.between = between

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for p in
                   (self.q, self.k, self.v))  # fmt: skip
        copies = q.size(1) // k.size(1)
        k, v = (y.repeat_interleave(copies, dim=1) for y in (self.between(k), v))
        return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    "between",
    [
        lambda k: k,
        rotated,
        lambda k: k * torch.rsqrt(k.square().mean(-1, keepdim=True) + 1e-6),
        lambda k: nn.functional.layer_norm(k, (HEAD_DIM,)),
    ],
    ids=["plain", "rope", "rms_norm", "layer_norm"],
)
def test_grouped_heads(between):
    told = check(Grouped(between), (hidden_states(),))
    assert shapes(told) == {
        "q": ("per_head", 2 * HEADS, 3),
        "k": ("per_head", HEADS, 3),
        "v": ("per_head", HEADS, 3),
    }


def test_one_head_of_keys_for_all_queries():
    model, x = Grouped(lambda k: k), hidden_states()
    model.k, model.v = (nn.Linear(HIDDEN, HEAD_DIM) for _ in "kv")
    told = check(model, (x,))
    assert shapes(told) == {"q": ("per_head", 2 * HEADS, 3), "k": ("matrix", 1, 3),
                            "v": ("matrix", 1, 3)}  # fmt: skip
    assert attention_of(model, x)[0] == "rank_space"


def test_heads_behind_keys_of_the_past():
    """Keys and values of earlier steps are inputs; those of this one are still heads."""

    class Step(Grouped):
        def forward(self, x, keys, values):
            q, k, v = (p(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for p in
                       (self.q, self.k, self.v))  # fmt: skip
            k, v = torch.cat((keys, k), 2), torch.cat((values, v), 2)
            return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    past = [torch.randn(2, HEADS, 4, HEAD_DIM) for _ in "kv"]
    told = check(Step(None), (hidden_states(), *past))
    assert [shapes(told)[name][:2] for name in "kv"] == [("per_head", HEADS)] * 2


def test_a_norm_over_all_heads_leaves_one_matrix():
    model, args = Attention("dense", "dense", "dense"), attention_inputs("sdpa")
    model.k = nn.Sequential(model.k, nn.LayerNorm(HEADS * HEAD_DIM))
    told = check(model, args)
    assert shapes(told)["k.0"] == ("matrix", 1, 6)
    assert shapes(told)["q"] == PER_HEAD


def test_products_before_an_attention_without_projections_are_no_heads():
    """Heads that are cut from a stream of sums: what was added to it long before are no heads."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x):
            x = (x + self.mlp(x)).unflatten(-1, (3, 10)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert shapes(check(Bare(), (hidden_states(),))) == {"mlp": ("matrix", 1, 7)}


# ---- models --------------------------------------------------------------------------------------

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 72}  # fmt: skip


def _model(family, attention):
    kind = {"attn_implementation": attention}
    models = {
        "bert": lambda: BertModel(BertConfig(vocab_size=50, **_SIZES, **kind)),
        "vit": lambda: ViTModel(ViTConfig(image_size=16, patch_size=4, **_SIZES, **kind)),
        "llama": lambda: LlamaModel(
            LlamaConfig(vocab_size=50, num_key_value_heads=2, use_cache=False, **_SIZES, **kind)
        ),
        "gpt2": lambda: GPT2Model(
            GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, use_cache=False,
                       bos_token_id=0, eos_token_id=0, **kind)
        ),
    }  # fmt: skip
    model = models[family]().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero
            nn.init.normal_(parameter, std=0.1)
    return model


def _given(family):
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    given = {"input_ids": torch.randint(0, 50, (2, 9))}
    given["attention_mask"] = torch.ones(2, 9, dtype=torch.long)
    given["attention_mask"][1, 5:] = 0
    return given


def first(model, names):
    """``model`` with its inputs by position, giving its first output."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args):
            return self.model(**dict(zip(names, args, strict=True)))[0]

    return First()


@pytest.mark.parametrize(
    ("family", "attention"),
    [("bert", "sdpa"), ("bert", "eager"), ("vit", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa")],
)
def test_models(family, attention):
    """What the backend factors and how large, is what `compress_` does, which reads names."""
    model, given = _model(family, attention), _given(family)
    want = copy.deepcopy(model)
    report = compress_(want, keep=0.5)
    told = explain(model, options=KEEP, **given)
    (factoring,) = told.factoring
    named = {row.path for row in report.rows if row.kind != "dense"}
    assert {row.weight.removesuffix(".weight") for row in factoring.factored} == named
    assert factoring.factor_bytes == sum(r.bytes_after for r in report.rows)
    assert factoring.dense_bytes == sum(r.bytes_before for r in report.rows)
    sites = [s for s in told.sites if s.kind == "attention"]
    assert [s.lowering for s in sites] == ["rank_space"] * 2
    latents = {"llama": {"q", "v"}}.get(family, {"q", "k", "v"})
    assert {arm for arm, rank in sites[0].to_dict()["plan"]["ranks"].items()
            if rank != "dense"} == latents  # fmt: skip
    with no_pass_may_fail():
        args = tuple(given.values())
        assert_as_good_as_eager(first(want, given), compiled(first(model, given)), args)


# ---- shapes, dtypes, compilers -------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compilers(compiler):
    calls = [(hidden_states(),), (hidden_states(),)]
    check(Layer(), *calls, options={**KEEP, "compiler": compiler})


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_any_size_needs_one_graph(compiler, tmp_path):
    calls = [(hidden_states(batch, rows),) for batch, rows in ((2, 5), (3, 11), (4, 7))]
    options = {**KEEP, "compiler": compiler, "debug_dir": tmp_path}
    check(Layer(), *calls, options=options, dynamic=True)
    assert [path.name for path in tmp_path.iterdir()] == ["graph_0"]


def test_bfloat16():
    told = check(Layer().bfloat16(), (hidden_states().bfloat16(),))
    assert told["factor_bytes"] < told["dense_bytes"]


@pytest.mark.parametrize(("dtype", "off"), [(torch.float16, 1e-2), (torch.float64, 1e-12)])
def test_other_dtypes(dtype, off):
    model, x = Layer().to(dtype), hidden_states().to(dtype)
    low = explicit(model, told_of(model, x))
    with no_pass_may_fail():
        result = compiled(model)(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result, low(x), atol=off, rtol=off)


def test_autocast():
    model, x = Layer(), hidden_states()

    def run(module):
        def called(x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return module(x)

        return called

    low = explicit(model, told_of(model, x))
    with no_pass_may_fail():
        result, want = compiled(run(model))(x), run(low)(x)
    assert result.dtype == want.dtype == run(model)(x).dtype
    torch.testing.assert_close(result, want, atol=0.05, rtol=0.05)


def test_inference_mode():
    model, x = Layer(), hidden_states()
    low, run = explicit(model, told_of(model, x)), compiled(model)
    with no_pass_may_fail():
        with torch.inference_mode():
            result = run(x)
        torch.testing.assert_close(result, low(x))
        torch.testing.assert_close(run(x), low(x))


def test_frozen_weights_with_gradients_enabled():
    model, x = Layer().requires_grad_(False), hidden_states()
    with torch.enable_grad(), no_pass_may_fail():
        told = told_of(model, x)
        assert told["refused"] is None
        torch.testing.assert_close(compiled(model)(x), explicit(model, told)(x))


def test_conv1d():
    from transformers.pytorch_utils import Conv1D

    told = check(nn.Sequential(Conv1D(30, 20), nn.ReLU(), Conv1D(8, 30)), (torch.randn(2, 5, 20),))
    assert shapes(told) == {"0": ("matrix", 1, 6), "2": ("matrix", 1, 3)}


def test_spelled_products():
    """``x @ w``, ``x @ w.t()``, ``mm`` and a two-operand einsum with the columns last."""

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in "abcd":
                self.register_parameter(name, nn.Parameter(torch.randn(20, 20) / 5))

        def forward(self, x):
            x = (x @ self.a).relu()
            x = (x @ self.b.t()).relu()
            x = torch.mm(x.flatten(0, 1), self.c).relu().view_as(x)
            return torch.einsum("bmi,oi->bmo", x, self.d)

    model, x = Products(), torch.randn(2, 5, 20)
    told = told_of(model, x)
    assert shapes(told) == dict.fromkeys("abcd", ("matrix", 1, 5))
    dense = copy.deepcopy(model)
    for name, parameter in dense.named_parameters():
        q, sigma, zh = torch.linalg.svd(parameter.detach())
        parameter.copy_((q[:, :5] * sigma[:5]) @ zh[:5])
        assert name in told["weights"][ord(name) - ord("a")]["weight"]
    with no_pass_may_fail():
        torch.testing.assert_close(compiled(model)(x), dense(x), atol=1e-4, rtol=1e-4)


# ---- shared weights ------------------------------------------------------------------------------


def test_a_tied_weight_is_factored_once():
    model, x = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20)), torch.randn(5, 20)
    model[2].weight = model[0].weight
    told = told_of(model, x)
    assert [(row["products"], row["rank"]) for row in told["weights"]] == [(2, 5)]
    want = copy.deepcopy(model)
    q, sigma, zh = torch.linalg.svd(want[0].weight)
    want[0].weight.copy_((q[:, :5] * sigma[:5]) @ zh[:5])
    torch.testing.assert_close(compiled(model)(x), want(x), atol=1e-5, rtol=1e-5)


def test_an_embedding_table_stays_dense():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(40, 20), nn.Linear(20, 40, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    model, ids = Tied(), torch.randint(0, 40, (2, 5))
    told = told_of(model, ids)
    assert list(codes(told).values()) == ["embedding_table"]
    assert torch.equal(compiled(model)(ids), model(ids))


# ---- near misses ---------------------------------------------------------------------------------


def spelled(forward, **shapes):
    class Spelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, shape in shapes.items():
                self.register_parameter(name, nn.Parameter(torch.randn(shape)))

        def forward(self, x):
            return forward(self, x)

    return Spelled()


def _written(self, x):
    self.w.mul_(1.0)
    return x @ self.w


MISSES = {
    "low_rank": (lambda: low_rank(20, 20), ["already_low_rank"] * 2),
    "one_row": (lambda: nn.Linear(20, 1), ["rank_too_large"]),
    "two_rows": (lambda: nn.Sequential(nn.Linear(20, 2), nn.ReLU(), nn.Linear(2, 2)),
                 ["rank_too_large"]),
    "left": (lambda: spelled(lambda s, x: s.w @ x.mT, w=(20, 20)), ["bad_layout"]),
    "stacked": (lambda: spelled(lambda s, x: x @ s.w, w=(1, 20, 20)), ["bad_layout"]),
    "computed": (lambda: spelled(lambda s, x: x @ (s.w * 2), w=(20, 20)), ["op_not_carried"]),
    "cast": (lambda: spelled(lambda s, x: x @ s.w.to(x.dtype), w=(20, 20)).double(),
             ["op_not_carried"]),
    "both_ways": (lambda: spelled(lambda s, x: (x @ s.w).relu() @ s.w.t(), w=(20, 20)),
                  ["bad_layout"]),
    "scaled": (lambda: spelled(lambda s, x: torch.addmm(s.b, x[0], s.w, alpha=2.0),
                               w=(20, 20), b=(20,)), ["bad_layout"]),
    "written": (lambda: spelled(_written, w=(20, 20)), ["mutated"]),
    "not_finite": (lambda: spelled(lambda s, x: x @ (s.w), w=(20, 20)), ["no_values"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSES)
def test_near_misses(name):
    make, expected = MISSES[name]
    model, x = make(), torch.randn(2, 5, 20)
    if name == "not_finite":
        next(model.parameters())[0, 0] = torch.inf
    told = told_of(model, x)
    assert list(codes(told).values()) == expected
    if name == "two_rows":  # the first of them is factored
        return
    assert told["factor_bytes"] == 0
    with no_pass_may_fail():
        torch.testing.assert_close(compiled(model)(x), model(x), equal_nan=True)


def test_weights_that_are_arguments_are_no_models():
    told = told_of(lambda x, w: x @ w, torch.randn(5, 20), torch.randn(20, 20))
    assert told["weights"] == []


def test_the_meta_device():
    with torch.device("meta"):
        model, x = Layer(), hidden_states()
    told = explain(model, x, options=KEEP, device="h100").to_dict()["factoring"][0]
    assert set(codes(told).values()) == {"no_values"}
    assert len(codes(told)) == 6


# ---- training ------------------------------------------------------------------------------------


def test_training_is_refused(caplog):
    model, x = Layer(), hidden_states()
    with torch.enable_grad(), caplog.at_level(logging.WARNING, "flashsvd_compile"):
        told = told_of(model, x)
        result, want = compiled(model)(x), model(x)
        torch.testing.assert_close(result, want)
        result.sum().backward()
    assert told["refused"]["code"] == "gradients"
    assert told["weights"] == []
    assert model.mlp.up.weight.grad is not None
    (warning,) = caplog.records
    assert "no weight factored: gradients: " in warning.getMessage()
    assert "requires a gradient" in warning.getMessage()


def test_one_model_in_training_and_inference():
    model, x = Layer(), hidden_states()
    run, low = compiled(model), explicit(model, told_of(model, x))
    torch.testing.assert_close(run(x), low(x))
    with torch.enable_grad():
        torch.testing.assert_close(run(x), model(x))
    torch.testing.assert_close(run(x), low(x))


def test_gradients_enabled_inside_are_refused():
    model = FeedForward()

    def inner(x):
        with torch.enable_grad():
            return model(x)

    assert told_of(inner, torch.randn(5, 30))["refused"]["code"] == "gradients"


def test_an_input_that_needs_a_gradient_is_refused():
    model, x = FeedForward().requires_grad_(False), torch.randn(5, 30, requires_grad=True)
    with torch.enable_grad():
        assert told_of(model, x)["refused"]["code"] == "gradients"


# ---- options -------------------------------------------------------------------------------------


def test_a_budget_in_bytes():
    model, x = Layer(), hidden_states()
    dense = told_of(model, x)["dense_bytes"]
    previous = 0
    for part in (0.2, 0.5, 0.8):
        budget = int(part * dense)
        told = check(model, (x,), options={**KEEP, "keep": None, "weight_budget": budget})
        total = sum(row["factor_bytes"] or row["dense_bytes"] for row in told["weights"])
        assert previous < total <= budget
        previous = total


@pytest.mark.parametrize(("budget", "words"), [(64, "rank 1"), ("1MiB", "as they are")])
def test_budgets_that_plan_nothing(budget, words):
    model, x = Layer(), hidden_states()
    options = {**KEEP, "keep": None, "weight_budget": budget}
    told = told_of(model, x, options=options)
    assert told["refused"]["code"] == "weight_budget"
    assert words in told["refused"]["observed"]
    torch.testing.assert_close(compiled(model, options)(x), model(x))


def test_two_options_in_one_process():
    model, x = Layer(), hidden_states()
    runs = {keep: compiled(model, {**KEEP, "keep": keep}) for keep in (0.25, 0.5, None)}
    for _ in range(2):
        for keep, run in runs.items():
            options = {**KEEP, "keep": keep}
            low = explicit(model, told_of(model, x, options=options)) if keep else model
            torch.testing.assert_close(run(x), low(x))


def test_without_the_options_nothing_is_factored():
    told = explain(Layer(), hidden_states(), options={**KEEP, "keep": None})
    assert told.factoring == ()
    assert told.to_dict()["factoring"] == []
    assert "factor" not in str(told)


# ---- what is told --------------------------------------------------------------------------------


def test_what_is_told(tmp_path, caplog):
    model, x = Layer(), hidden_states()
    told = explain(model, x, options=KEEP)
    (factoring,) = told.factoring
    words = ("6 of 6 weights factored", "stay alive", "compress_ would keep the factors only")
    for part in (*words, "attention.q.weight", "per_head"):
        assert part in str(told)
    copied = copy.deepcopy(model)
    report = compress_(copied, keep=0.5)
    saved = report.model_bytes_before - report.model_bytes_after
    assert factoring.dense_bytes - factoring.factor_bytes == saved
    for row, after in zip(factoring.rows, report.rows, strict=True):
        assert row.error == pytest.approx(after.error, rel=1e-3)
    with caplog.at_level(logging.INFO, "flashsvd_compile"):
        compiled(model, {**KEEP, "debug_dir": tmp_path})(x)
    assert any("6 of 6 weights factored" in r.getMessage() for r in caplog.records)
    assert "attention.q.weight" in (tmp_path / "graph_0" / "report.txt").read_text()
    assert '"factor_bytes"' in (tmp_path / "graph_0" / "sites.json").read_text()
