"""Blocks fitted one after another, heads narrowed on both sides: found where legal, and better."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

import flashsvd_compile as fsc
from flashsvd_compile.compress import anchored, fitting
from flashsvd_compile.compress.blocks import find_blocks
from flashsvd_compile.compress.heads import find_projections
from flashsvd_compile.compress.joint import find_joints
from flashsvd_compile.compress.joint_modules import NarrowHeadsLinear, NarrowInputLinear
from flashsvd_compile.compress.linears import find_linears
from flashsvd_compile.compress.matrices import Matrices
from flashsvd_compile.compress.moments import in_evaluation
from flashsvd_compile.compress.stages import Sum, stages_of

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip


def bert():
    return BertModel(BertConfig(**SIZES, vocab_size=50), add_pooling_layer=False)


def vit():
    return ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=4), add_pooling_layer=False)


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=50))


def gpt2():
    return GPT2Model(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16))


def t5():
    config = T5Config(d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=48, vocab_size=50)
    return T5EncoderModel(config)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def spread(model):
    """Random weights of a size at which attention attends."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(std=2 * p.shape[1] ** -0.5)
            elif name.endswith("bias"):
                p.normal_(std=0.3)
    return model.eval()


def tokens(count=6, rows=4, length=12):
    return [
        {"input_ids": torch.randint(0, 50, (rows, length)),
         "attention_mask": (torch.arange(length) < torch.randint(4, length, (rows, 1))).long()}
        for _ in range(count)
    ]  # fmt: skip


def pixels(count=6):
    return [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(count)]


def parts(model, batches):
    linears = [x for x in find_linears(model) if x.weight is not None]
    matrices = {x.path: Matrices(x, x.weight, None) for x in linears}
    with in_evaluation(model):
        blocks = find_blocks(model, matrices, batches)
        found = find_projections(model, {p: one.weight.shape[0] for p, one in matrices.items()})
        return matrices, blocks, find_joints(blocks, matrices, found)


@pytest.mark.parametrize(
    ("make", "batches", "kinds"),
    [
        (bert, tokens, ["scores", "values"]),
        (vit, pixels, ["scores", "values"]),
        (t5, tokens, ["scores", "values"]),  # a learned bias is added to the scores, as they are
        (llama, tokens, ["values"]),  # positions are rotated in between
        (gpt2, tokens, []),  # one linear for all three
    ],
)
def test_heads_are_narrowed_where_nothing_stands_between(make, batches, kinds):
    _, blocks, joints = parts(spread(make()), batches(2))
    assert len(blocks.paths) == 2
    assert [joint.kind for joint in joints] == kinds * 2
    for joint in joints:
        wanted = {"scores": ("q", "k"), "values": ("v", "o")}[joint.kind]
        first, second = (path.rpartition(".")[2] for path in joint.paths)
        assert first.startswith(wanted[0])
        assert second.startswith(wanted[1]) or joint.second.endswith("attention.output.dense")


class Normed(nn.Module):
    """A block whose queries and keys are normed, and whose values are rectified."""

    def __init__(self, norm=True):
        super().__init__()
        self.num_heads, self.head_dim, self.norm = 4, 8, norm
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(32, 32) for _ in "qkvo")

    def forward(self, x):
        q, k, v = (
            f(x).unflatten(-1, (4, 8)).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.norm:
            q, k, v = (
                nn.functional.normalize(q, dim=-1),
                nn.functional.normalize(k, dim=-1),
                v.relu(),
            )
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out_proj(found.transpose(1, 2).flatten(-2))


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("norm", [False, True])
def test_norms_and_activations_stand_between(norm):
    model = spread(Stack(*(Normed(norm) for _ in range(2))))
    _, _, joints = parts(model, [torch.randn(3, 10, 32) for _ in range(2)])
    assert len(joints) == (0 if norm else 4)


def test_keys_of_another_sequence_are_not_narrowed_with_queries():
    class Cross(Normed):
        def forward(self, x):
            shifted = x.roll(1, 1)
            q, k, v = self.q_proj(x), self.k_proj(shifted), self.v_proj(shifted)
            q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in (q, k, v))
            found = nn.functional.scaled_dot_product_attention(q, k, v)
            return x + self.out_proj(found.transpose(1, 2).flatten(-2))

    _, _, joints = parts(spread(Stack(Cross(), Cross())), [torch.randn(3, 10, 32)])
    assert [joint.kind for joint in joints] == ["values"] * 2


@pytest.mark.parametrize(
    ("make", "batches", "sums"),
    [
        (bert, tokens, {"attention.output.dense": "LayerNorm", "output.dense": "LayerNorm"}),
        (vit, pixels, {"o_proj": "LayerNorm", "fc2": None}),
    ],
)
@torch.no_grad()
def test_residual_sums_are_found(make, batches, sums):
    matrices, blocks, _ = parts(spread(make()), batches(1))
    own = {one.linear.module: p for p, one in matrices.items() if p.startswith(blocks.paths[0])}
    stages = stages_of(blocks, 0, blocks.hidden[0], own)
    assert [len(stage) for stage in stages] == [3, 1, 1, 1]
    found = {path: place for stage in stages for path, place in stage.items() if place is not None}
    assert len(found) == 2
    for (path, place), (name, kind) in zip(found.items(), sums.items(), strict=True):
        assert path.endswith(name)
        assert isinstance(place, Sum)
        assert (None if place.module is None else type(place.module).__name__) == kind


def gap(model, other, batches):
    with torch.no_grad():
        pairs = [(call(model, b), call(other, b)) for b in batches]
    return float(
        sum((x - y).square().sum() for x, y in pairs) / sum(x.square().sum() for x, _ in pairs)
    )


def call(model, batch):
    output = model(**batch) if isinstance(batch, dict) else model(batch)
    if isinstance(output, torch.Tensor):
        return output
    found = output[0]
    mask = batch.get("attention_mask")
    return found if mask is None else found[mask.bool()]


@pytest.mark.parametrize(("make", "batches"), [(bert, tokens), (vit, pixels), (llama, tokens)])
def test_it_errs_less_than_matrices_for_themselves(make, batches, monkeypatch):
    model, given = spread(make()), batches(12)
    ours, alone = copy.deepcopy(model), copy.deepcopy(model)
    include = ["*layers.*" if make is not bert else "encoder.*"]
    report = fsc.compress_(ours, keep=0.6, calibration=given, include=include)
    assert {"narrow", "matrix"} <= {row.kind for row in report.rows}
    taken = [row for row in report.rows if row.reason != "not included"]
    assert sum(r.bytes_after for r in taken) <= 0.6 * sum(r.bytes_before for r in taken)
    monkeypatch.setattr(fitting, "find_blocks", lambda *_: None)
    other = fsc.compress_(alone, keep=0.6, calibration=given, include=include)
    assert "narrow" not in {row.kind for row in other.rows}
    held_out = batches(6)
    assert gap(model, ours, held_out) < 0.9 * gap(model, alone, held_out)


@pytest.mark.parametrize("grouped", [False, True])
@torch.no_grad()
def test_what_heads_can_do_without_costs_nothing(grouped):
    """Queries, keys and values that span half a head are narrowed to it exactly."""
    model = spread(llama() if grouped else bert())
    for name, p in model.named_parameters():
        if name.endswith(("v_proj.weight", "value.weight", "key.weight")):
            low = p.view(-1, 8, 32)
            basis = torch.linalg.qr(torch.randn(len(low), 8, 2))[0]
            p.copy_((basis @ basis.mT @ low).flatten(0, 1))
        elif name.endswith(("value.bias", "key.bias")):
            p.zero_()
    names = ["v_proj", "o_proj"] if grouped else ["query", "key", "value", "attention.output.dense"]
    made, given = copy.deepcopy(model), tokens(12)
    report = fsc.compress_(
        made, keep=0.3, calibration=given, include=[f"*{name}" for name in names]
    )
    rows = [row for row in report.rows if row.reason != "not included"]
    assert {(row.kind, row.rank) for row in rows} == {("narrow", 2)}
    assert max(row.error for row in rows) < 1e-2
    assert gap(model, made, tokens(3)) < 1e-6


def test_modules_and_factors_say_what_they_are():
    model = spread(bert())
    report = fsc.compress_(model, keep=0.5, calibration=tokens(), include=["encoder.*"])
    layer = model.encoder.layer[0].attention
    assert isinstance(layer.self.query, NarrowHeadsLinear)
    assert isinstance(layer.output.dense, NarrowInputLinear)
    assert {m.method for m in (layer.self.key, model.encoder.layer[1].output.dense)} == {"planned"}
    assert all(row.loss > 0 for row in report.rows if row.kind != "dense")


@pytest.mark.parametrize("when", [1, 3, 7])
def test_an_interrupt_leaves_the_model(when, monkeypatch):
    model = spread(bert()).train()
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    counted = []

    def interrupted(*args):
        counted.append(args)
        if len(counted) == when:
            raise KeyboardInterrupt
        return plain(*args)

    plain = anchored.moved
    monkeypatch.setattr(anchored, "moved", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fsc.compress_(model, keep=0.5, calibration=tokens(), include=["encoder.*"])
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks


def test_caches_are_left_out_and_come_back():
    model = spread(llama())
    assert model.config.use_cache
    fsc.compress_(model, keep=0.4, calibration=tokens(), include=["*v_proj", "*o_proj"])
    assert model.config.use_cache
    assert isinstance(model.model.layers[0].self_attn.v_proj, NarrowHeadsLinear)


class Again(Stack):
    """Every block is called twice."""

    def forward(self, x):
        return super().forward(super().forward(x))


class Counting(Normed):
    """What it makes depends on how often it has run."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class Sideways(Stack):
    """The blocks do not read one another."""

    def forward(self, x):
        return sum(block(x) for block in self.blocks)


@pytest.mark.parametrize(
    "model",
    [Again(Normed(), Normed()), Stack(Counting(), Counting()), Sideways(Normed(), Normed()),
     nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))],
    ids=["twice", "counting", "sideways", "no blocks"],
)  # fmt: skip
def test_without_blocks_in_a_row_each_matrix_is_factored_for_itself(model):
    given = [torch.randn(3, 10, 32) for _ in range(3)]
    report = fsc.compress_(model, keep=0.5, calibration=given)
    assert {row.kind for row in report.rows} <= {"per_head", "matrix", "dense"}
    assert any(row.kind != "dense" for row in report.rows)


def test_one_block_is_enough():
    model = Stack(Normed(norm=False))
    report = fsc.compress_(model, keep=0.5, calibration=[torch.randn(3, 10, 32) for _ in range(3)])
    assert [row.kind for row in report.rows] == ["narrow"] * 4


def test_calibration_may_be_read_once():
    model = spread(bert())
    report = fsc.compress_(model, keep=0.5, calibration=iter(tokens()), include=["encoder.*"])
    assert any(row.kind == "narrow" for row in report.rows)


class Experts(nn.Module):
    """Each token goes through one of three linears; the last is rarely called."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.out = nn.Linear(32, 32)

    def forward(self, x):
        flat = x.reshape(-1, 32)
        made, chosen = torch.zeros_like(flat), flat[:, :3].argmax(1)
        for index, expert in enumerate(self.experts):
            if (chosen == index).any():
                made[chosen == index] = expert(flat[chosen == index])
        return x + self.out(made.relu()).view_as(x)


def test_experts_are_factored_for_themselves():
    """What a compressed block sends to another expert has no counterpart."""
    model = spread(Stack(Experts(), Experts()))
    given = [torch.randn(3, 10, 32) for _ in range(4)]
    given[0][..., 2] = -9  # the third is not called in the first batch
    made = copy.deepcopy(model)
    report = fsc.compress_(made, keep=0.5, calibration=given)
    assert [row.kind for row in report.rows].count("matrix") >= 6
    assert gap(model, made, given) < 0.5


class Shared(Normed):
    """One linear makes queries and, of other inputs, the output, too."""

    def __init__(self):
        super().__init__(norm=False)
        self.up = nn.Linear(32, 32)

    def forward(self, x):
        return self.up(super().forward(self.up(x)))


def test_a_linear_that_is_called_twice_is_factored_for_itself():
    model = Stack(Shared(), Shared())
    report = fsc.compress_(model, keep=0.5, calibration=[torch.randn(3, 10, 32) for _ in range(4)])
    kinds = {row.path.rpartition(".")[2]: row.kind for row in report.rows}
    assert kinds["up"] in ("matrix", "dense")
    assert kinds["q_proj"] == "narrow"


def test_in_half_precision():
    model = spread(bert()).bfloat16()
    made = copy.deepcopy(model)
    fsc.compress_(made, keep=0.6, calibration=tokens(), include=["encoder.*"])
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert gap(model.float(), made.float(), tokens(3)) < 0.5


# ---- what other places read ---------------------------------------------------------------------


def low_rank_keys(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("k_proj.weight"):
                p.view(4, 8, 32)[:, 4:] = 0
    return model


def test_a_linear_of_two_blocks_is_factored_for_itself():
    model = spread(Stack(Normed(norm=False), Normed(norm=False)))
    model.blocks[1].q_proj = model.blocks[0].q_proj
    low_rank_keys(model)
    given = [torch.randn(3, 10, 32) for _ in range(4)]
    report = fsc.compress_(model, keep=0.5, calibration=given)
    kinds = {row.path: row.kind for row in report.rows}
    assert kinds["blocks.0.q_proj"] in ("per_head", "dense")
    assert kinds["blocks.0.k_proj"] != "narrow"
    assert "narrow" in kinds.values()


class Kept(Normed):
    """Attends to the values of the first block, which come along."""

    def forward(self, x, values=None):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x) if values is None else values
        heads = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in (q, k, v))
        found = nn.functional.scaled_dot_product_attention(*heads)
        return x + self.out_proj(found.transpose(1, 2).flatten(-2)), v


def test_values_that_later_blocks_read_are_not_narrowed():
    class Passing(Stack):
        def forward(self, x):
            values = None
            for block in self.blocks:
                x, values = block(x, values)
            return x

    given = [torch.randn(3, 10, 32) for _ in range(4)]
    model = spread(Passing(Kept(norm=False), Kept(norm=False)))
    report = fsc.compress_(model, keep=0.6, calibration=given)
    kinds = {row.path: row.kind for row in report.rows}
    assert kinds["blocks.0.v_proj"] != "narrow"
    assert kinds["blocks.0.out_proj"] != "narrow"
    assert kinds["blocks.0.q_proj"] == "narrow"


def test_tied_biases_stay_tied():
    model = spread(Stack(Normed(norm=False), Normed(norm=False)))
    for name in ("q_proj", "v_proj"):
        getattr(model.blocks[1], name).bias = getattr(model.blocks[0], name).bias
    whole = sum(p.numel() * 4 for p in model.parameters())
    given = [torch.randn(3, 10, 32) for _ in range(4)]
    report = fsc.compress_(model, weight_budget=int(0.6 * whole), calibration=given)
    assert model.blocks[0].v_proj.bias is model.blocks[1].v_proj.bias
    assert report.model_bytes_after <= 0.6 * whole


# ---- what could not be compared -----------------------------------------------------------------


class Sometimes(Normed):
    """Attends only where there are more than eight tokens."""

    def __init__(self):
        super().__init__(norm=False)
        self.up = nn.Linear(32, 32)

    def forward(self, x):
        return self.up(super().forward(x) if x.shape[1] > 8 else x)


def test_a_pair_that_a_batch_does_not_call_is_narrowed_within_the_budget():
    model = spread(Stack(Sometimes(), Sometimes()))
    made = copy.deepcopy(model)
    given = [torch.randn(3, n, 32) for n in (10, 10, 10, 5)]
    report = fsc.compress_(made, keep=0.6, calibration=given)
    assert "narrow" in {row.kind for row in report.rows}
    assert sum(r.bytes_after for r in report.rows) <= 0.6 * sum(r.bytes_before for r in report.rows)
    assert gap(model, made, given) < 0.7


def test_what_hardly_varies_is_fitted_all_the_same():
    model = spread(bert())
    with torch.no_grad():
        for layer in model.encoder.layer:  # four channels are constants
            layer.output.LayerNorm.weight[:4] = 0
            layer.output.LayerNorm.bias[:4] = torch.tensor([0.1, 0.1, 1.7, 1.7])
            layer.attention.self.query.weight.mul_(1e-3)  # and heads attend to all alike
            layer.attention.self.value.weight[:8] *= 1e-4
    made = copy.deepcopy(model)
    fsc.compress_(made, keep=0.6, calibration=tokens(), include=["encoder.*"])
    assert gap(model, made, tokens(3)) < 0.5


def test_queries_and_keys_need_not_be_called_in_a_row():
    class Turned(Normed):
        def forward(self, x):
            q, v, k = self.q_proj(x), self.v_proj(x.roll(1, 1)), self.k_proj(x)
            heads = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in (q, k, v))
            found = nn.functional.scaled_dot_product_attention(*heads)
            return x + self.out_proj(found.transpose(1, 2).flatten(-2))

    model = spread(Stack(Turned(), Turned()))
    report = fsc.compress_(model, keep=0.6, calibration=[torch.randn(3, 10, 32) for _ in range(4)])
    assert any(row.kind == "narrow" for row in report.rows if row.path.endswith("q_proj"))


def test_calibration_that_fills_caches_leaves_them_alone():
    given = [{**batch, "use_cache": True} for batch in tokens(3)]
    report = fsc.compress_(spread(llama()), keep=0.5, calibration=given, include=["*layers.*"])
    assert {row.kind for row in report.rows} <= {"per_head", "matrix", "dense"}


# ---- what is left as it was ---------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_what_was_trained_still_is(train):
    model = spread(bert()).train(train)
    model.requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad = name.endswith("bias") or ".0." in name
    fsc.compress_(model, keep=0.5, calibration=tokens(), include=["encoder.*"])
    assert all(module.training == train for module in model.modules())
    for name, p in model.named_parameters():
        assert p.requires_grad == (name.endswith("bias") or ".0." in name), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_residual_sums_are_found_in_every_dtype(dtype):
    model = spread(Stack(*(Normed(norm=False) for _ in range(2)))).to(dtype)
    matrices, blocks, _ = parts(model, [(30 * torch.randn(3, 10, 32)).to(dtype)])
    own = {one.linear.module: p for p, one in matrices.items() if p.startswith(blocks.paths[0])}
    places = {}
    for stage in stages_of(blocks, 0, blocks.hidden[0], own):
        places |= stage
    assert [path.rpartition(".")[2] for path, place in places.items() if place] == ["out_proj"]


def test_blocks_within_a_pipeline_are_found():
    inner = Stack(*(Normed(norm=False) for _ in range(4)))
    model = spread(nn.Sequential(inner, nn.Sequential(nn.Linear(32, 32), nn.ReLU())))
    given = [torch.randn(3, 10, 32) for _ in range(4)]
    blocks = find_blocks(model, [linear.path for linear in find_linears(model)], given)
    assert blocks is not None
    assert blocks.paths == [f"0.blocks.{index}" for index in range(4)]
    report = fsc.compress_(model, keep=0.6, calibration=given)
    assert "narrow" in {row.kind for row in report.rows}


def test_values_of_an_encoder_are_narrowed_with_their_output(monkeypatch):
    class Reading(Normed):
        def forward(self, x, source):
            q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
            heads = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in (q, k, v))
            found = nn.functional.scaled_dot_product_attention(*heads)
            return x + self.out_proj(found.transpose(1, 2).flatten(-2))

    class Decoder(Stack):
        def forward(self, x):
            source = x[:, :4] * 2
            for block in self.blocks:
                x = block(x, source)
            return x

    model = spread(Decoder(Reading(norm=False), Reading(norm=False)))
    made, given = copy.deepcopy(model), [torch.randn(3, 10, 32) for _ in range(8)]
    report = fsc.compress_(made, keep=0.6, calibration=given)
    kinds = {row.path.rpartition(".")[2]: row.kind for row in report.rows}
    assert kinds["v_proj"] == kinds["out_proj"] == "narrow"
    assert sum(r.bytes_after for r in report.rows) <= 0.6 * sum(r.bytes_before for r in report.rows)
    alone = copy.deepcopy(model)
    monkeypatch.setattr(fitting, "find_blocks", lambda *_: None)
    fsc.compress_(alone, keep=0.6, calibration=given)
    assert gap(model, made, given) < gap(model, alone, given)


def test_a_model_that_writes_into_what_its_linears_return():
    class Scaled(Normed):
        def forward(self, x):
            q = self.q_proj(x)
            q /= 2
            return self.out_proj(q)

    report = fsc.compress_(Stack(Scaled()), keep=0.5, calibration=[torch.randn(3, 10, 32)] * 2)
    assert any(row.kind != "dense" for row in report.rows)
