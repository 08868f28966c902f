"""`finetune` brings a compressed model closer to its teacher, and leaves all else as it was."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

import flashsvd_compile as fsc
from flashsvd_compile.compress import finetuning
from flashsvd_compile.compress.distilling import distillation, embeddings

pytest.importorskip("accelerate")

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 50, "initializer_range": 0.2,
}  # fmt: skip
FAST = {"max_steps": 30, "learning_rate": 3e-3, "per_device_train_batch_size": 8, "use_cpu": True,
        "disable_tqdm": True, "logging_strategy": "no"}  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def encoder():
    return BertModel(BertConfig(**SIZES), add_pooling_layer=False).eval()


def masked():
    return BertForMaskedLM(BertConfig(**SIZES)).eval()


def examples(count=64):
    return [{"input_ids": torch.randint(50, (3 + i % 7,)).tolist()} for i in range(count)]


@torch.no_grad()
def off(model, teacher, given):
    return sum(float(distillation(model(**b), teacher(**b), b)) for b in given)


@pytest.mark.parametrize("make", [encoder, masked])
@pytest.mark.parametrize("kind", ["examples", "batches", "iterator"])
def test_it_comes_closer_to_its_teacher(make, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = make()
    model = copy.deepcopy(teacher)
    fsc.compress_(model, keep=0.5)
    rows = examples()
    seen = [finetuning.padded(rows[i : i + 8]) for i in range(0, len(rows), 8)]
    before, kept = off(model, teacher, seen), copy.deepcopy(teacher.state_dict())
    data = {"examples": rows, "batches": seen, "iterator": iter(seen)}[kind]
    args = FAST if kind == "examples" else FAST | {"per_device_train_batch_size": 1}
    output = fsc.finetune(model, teacher, data, args=args)
    assert output.global_step == 30
    assert off(model, teacher, seen) < 0.7 * before
    torch.testing.assert_close(teacher.state_dict(), kept, rtol=0, atol=0)
    assert all(p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in model.modules())
    assert not list(tmp_path.iterdir())


def test_ranks_are_cut_on_the_way():
    teacher = encoder()
    model = copy.deepcopy(teacher)
    fsc.compress_(model, keep=0.8)
    size = sum(p.numel() for p in model.parameters())
    args = FAST | {"max_steps": 6}
    fsc.finetune(model, teacher, examples(), args=args, retruncate={3: {"keep": 0.6}})
    assert sum(p.numel() for p in model.parameters()) < size
    assert torch.isfinite(model(torch.arange(5)[None]).last_hidden_state).all()


def test_a_loss_of_ones_own():
    teacher, seen = encoder(), []

    def loss(output, wanted, batch):
        seen.append(batch)
        assert output.last_hidden_state.requires_grad
        assert not wanted.last_hidden_state.requires_grad
        return (output.last_hidden_state - wanted.last_hidden_state).abs().mean()

    model = copy.deepcopy(teacher)
    fsc.finetune(model, teacher, examples(), args=FAST | {"max_steps": 2}, loss=loss)
    assert len(seen) == 2


def test_what_layers_make_is_compared():
    teacher = encoder()
    model = copy.deepcopy(teacher)
    fsc.compress_(model, keep=0.5)
    batch = finetuning.padded(examples(4))
    seen, wanted = (m(**batch, output_hidden_states=True) for m in (model, teacher))
    whole = distillation(seen, wanted, batch)
    last = distillation(model(**batch), teacher(**batch), batch)
    y, t = seen.hidden_states[1], wanted.hidden_states[1]
    real = batch["attention_mask"].bool()
    between = (y - t)[real].square().mean() / t[real].var()
    torch.testing.assert_close(whole, last + between)


@pytest.mark.parametrize("loss", [None, distillation])
def test_a_model_is_asked_for_what_the_loss_reads(loss, monkeypatch):
    teacher, asked = encoder(), []
    model = copy.deepcopy(teacher)
    model.register_forward_pre_hook(
        lambda m, args, given: asked.append(given.get("output_hidden_states")), with_kwargs=True
    )
    fsc.finetune(model, teacher, examples(), args=FAST | {"max_steps": 1}, loss=loss)
    assert asked == [True if loss is None else None]


def test_padding_has_no_part_in_the_loss():
    class Out:
        def __init__(self, hidden):
            self.last_hidden_state = hidden

        def values(self):
            return [self.last_hidden_state]

        def __iter__(self):
            return iter([self.last_hidden_state])

    y, t = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] + [0] * 4])
    batch = {"attention_mask": mask}
    expected = distillation(Out(y), Out(t), batch)
    y[mask == 0] = 7.0
    assert distillation(Out(y), Out(t), batch) == expected
    assert distillation(Out(t), Out(t), batch) == 0
    assert torch.allclose(embeddings(y, mask).norm(dim=-1), torch.ones(3))


def test_examples_are_padded():
    found = finetuning.padded([{"input_ids": [4, 5]}, {"input_ids": [6]}], 9)
    assert found["input_ids"].tolist() == [[4, 5], [6, 9]]
    assert found["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_refusals(monkeypatch):
    teacher = encoder()
    with pytest.raises(ValueError, match="holds no example"):
        fsc.finetune(teacher, teacher, [])
    other = BertModel(BertConfig(**SIZES | {"hidden_size": 16}), add_pooling_layer=False)
    with pytest.raises(ValueError, match="pass a loss of your own"):
        fsc.finetune(other, teacher, examples(), args=FAST)
    monkeypatch.setattr(finetuning, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"flashsvd_compile\[train\]"):
        fsc.finetune(nn.Identity(), teacher, examples())
