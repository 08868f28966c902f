"""`save_pretrained` and `from_pretrained`: what comes back, how it lies, what goes wrong."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flashsvd_compile as fsc
from flashsvd_compile.checkpoints.replacing import interrupted
from flashsvd_compile.compress.modules import (
    FusedPerHeadLowRankLinear,
    LowRankLinear,
    PerHeadLowRankLinear,
)

transformers = pytest.importorskip("transformers")
from tests.checkpoints.written import (  # noqa: E402
    FAMILIES,
    assert_same_logits,
    dense_model,
    logits,
)

LOW_RANK = (LowRankLinear, PerHeadLowRankLinear, FusedPerHeadLowRankLinear)


def compressed(family, keep=0.7):
    model = dense_model(family)
    fsc.compress_(model, keep=keep)
    return model


def block_of(directory):
    return json.loads((directory / "config.json").read_text())["flashsvd"]


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, shards, tmp_path):
    model = compressed(family)
    total = sum(p.numel() * 8 for p in model.parameters())
    fsc.save_pretrained(model, tmp_path / "saved", max_shard_size=total // shards + 1)
    files = sorted(f.name for f in (tmp_path / "saved").glob("*.safetensors"))
    assert (len(files) > 1) == (shards > 1)
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists() == (shards > 1)
    assert [f.name for f in tmp_path.iterdir()] == ["saved"]

    loaded = fsc.from_pretrained(tmp_path / "saved")
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    state = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert torch.equal(logits(loaded), logits(model))
    kinds = {p: type(m) for p, m in model.named_modules() if isinstance(m, LOW_RANK)}
    assert kinds
    assert {p: type(m) for p, m in loaded.named_modules() if isinstance(m, LOW_RANK)} == kinds
    assert len(list(loaded.parameters())) == len(list(model.parameters()))  # what was tied is
    assert_same_logits(fsc.load_checkpoint(tmp_path / "saved"), model)


def test_files_are_on_the_disk_before_they_take_the_place(monkeypatch, tmp_path):
    synced, fsync = [], os.fsync

    def record(descriptor):
        assert not (tmp_path / "saved").exists()
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    fsc.save_pretrained(compressed("llama"), tmp_path / "saved")
    assert sorted(synced) == sorted(f.stat().st_ino for f in (tmp_path / "saved").iterdir())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_round_trip_of_narrow_heads(dtype, tmp_path):
    config = transformers.BertConfig(
        hidden_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=40,
        vocab_size=50,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).to(dtype).eval()
    calibration = [torch.randint(0, 50, (3, 9)) for _ in range(4)]
    fsc.compress_(model, keep=0.5, calibration=calibration, include=["*encoder*"])
    kinds = {path: type(m) for path, m in model.named_modules() if "Narrow" in type(m).__name__}
    assert {kind.__name__ for kind in kinds.values()} == {"NarrowHeadsLinear", "NarrowInputLinear"}
    fsc.save_pretrained(model, tmp_path / "saved")
    entries = block_of(tmp_path / "saved")["modules"]
    assert {entries[path]["kind"] for path in kinds} == {"narrow_heads", "narrow_input"}
    loaded = fsc.from_pretrained(tmp_path / "saved")
    assert {path: type(loaded.get_submodule(path)) for path in kinds} == kinds
    assert torch.equal(logits(loaded), logits(model))
    half = fsc.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert logits(half).isfinite().all()


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("query", {"rank": 9}, r"rank must be in \[1, 8\]"),
        ("query", {"num_heads": 2}, r"is \[24, 24\], which .* is not"),
        ("output.dense", {"num_heads": 2}, r"is \[24, 24\], which .* is not"),
    ],
)
def test_narrow_heads_of_another_shape(path, changes, message, tmp_path):
    config = transformers.BertConfig(
        hidden_size=24, num_attention_heads=3, num_hidden_layers=1, intermediate_size=40,
        vocab_size=50,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).double().eval()
    calibration = [torch.randint(0, 50, (3, 9)) for _ in range(4)]
    fsc.compress_(model, keep=0.5, calibration=calibration, include=["*attention*"])
    fsc.save_pretrained(model, tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    content = json.loads(file.read_text())
    names = [n for n in content["flashsvd"]["modules"] if n.endswith(path)]
    content["flashsvd"]["modules"][names[0]] |= changes
    file.write_text(json.dumps(content))
    with pytest.raises(fsc.CheckpointError, match=message):
        fsc.from_pretrained(tmp_path / "saved")


_TWO_SIDES = {
    "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 3,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "vocab_size": 50,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip
_ONE_SIDE = {
    "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 40,
    "vocab_size": 50,
}  # fmt: skip
# Buffers and parameters that are computed, tied or shared in ways of their own.
OTHERS = {
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 24, "d_kv": 8, "num_heads": 3, "num_layers": 1, "d_ff": 40, "vocab_size": 50},
    ),
    "MarianMTModel": ("MarianConfig", _TWO_SIDES),
    "AlbertForMaskedLM": ("AlbertConfig", _ONE_SIDE | {"embedding_size": 16}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", _ONE_SIDE),
    "Gemma3ForCausalLM": (
        "Gemma3TextConfig",
        _ONE_SIDE | {"num_key_value_heads": 1, "head_dim": 8},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_all_tensors_of_other_families(name, tmp_path):
    config, sizes = OTHERS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()
    fsc.compress_(model, keep=0.6)
    fsc.save_pretrained(model, tmp_path)
    loaded = fsc.from_pretrained(tmp_path)
    for expected, got in (
        (model.state_dict(), loaded.state_dict()),
        (dict(model.named_buffers()), dict(loaded.named_buffers())),
    ):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in model.named_parameters()]


def test_the_block_says_kinds_ranks_heads_and_method(tmp_path):
    fsc.save_pretrained(compressed("bert"), tmp_path)
    block = block_of(tmp_path)
    assert block["format_version"] == 1
    assert block["modules"]["bert.encoder.layer.0.attention.self.query"] == {
        "kind": "per_head", "rank": 4, "num_heads": 3, "head_dim": 8, "bias": True, "method": "svd",
    }  # fmt: skip
    fsc.save_pretrained(compressed("gpt2"), tmp_path)
    assert block_of(tmp_path)["modules"]["transformer.h.1.attn.c_attn"]["num_parts"] == 3


def test_tied_embeddings_are_stored_once(tmp_path):
    model = compressed("llama_tied")
    fsc.save_pretrained(model, tmp_path)
    assert block_of(tmp_path)["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    loaded = fsc.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_embeddings_that_the_config_ties_and_the_model_does_not(tmp_path):
    model = compressed("llama_tied")
    model.lm_head.weight = nn.Parameter(torch.randn(50, 24, dtype=torch.float64))
    fsc.save_pretrained(model, tmp_path)
    assert_same_logits(fsc.from_pretrained(tmp_path), model)


def test_the_generation_config_comes_back(tmp_path):
    model = compressed("llama")
    model.generation_config.max_new_tokens = 7
    fsc.save_pretrained(model, tmp_path)
    assert fsc.from_pretrained(tmp_path).generation_config.max_new_tokens == 7


def test_shared_factors_stay_shared(tmp_path):
    model = compressed("llama")
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.u = first.u
    fsc.save_pretrained(model, tmp_path)
    loaded = fsc.from_pretrained(tmp_path)
    assert loaded.model.layers[0].mlp.up_proj.u is loaded.model.layers[1].mlp.up_proj.u
    assert_same_logits(loaded, model)


def test_parameters_that_are_views_of_one_another(tmp_path):
    model = compressed("bert")
    norms = [layer.output.LayerNorm for layer in model.bert.encoder.layer]
    both = torch.randn(2, 24, dtype=torch.float64)
    for norm, row in zip(norms, both, strict=True):
        norm.weight = nn.Parameter(row)
    model.bert.pooler = None
    embedding = model.bert.embeddings.token_type_embeddings
    embedding.weight = nn.Parameter(both)
    fsc.save_pretrained(model, tmp_path)
    assert_same_logits(fsc.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_merged_layers(family, tmp_path):
    """`merge_` leaves plain linears, in GPT-2 where transformers has a Conv1D."""
    model = compressed(family)
    name = {"gpt2": "transformer.h.0.mlp.c_fc", "llama": "model.layers.0.mlp.up_proj"}[family]
    low_rank = model.get_submodule(name)
    useless = LowRankLinear(24, 40, 24, bias=low_rank.bias is not None)
    model.set_submodule(name, useless.double().eval())
    assert [row.path for row in fsc.merge_(model).rows if row.is_merged] == [name]
    fsc.save_pretrained(model, tmp_path)
    loaded = fsc.from_pretrained(tmp_path)
    assert type(loaded.get_submodule(name)) is nn.Linear
    assert_same_logits(loaded, model)


def test_dtypes(tmp_path):
    model = compressed("llama").to(torch.bfloat16)
    model.model.norm.float()
    fsc.save_pretrained(model, tmp_path)
    loaded = fsc.from_pretrained(tmp_path)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert loaded.model.norm.weight.dtype == torch.float32
    loaded = fsc.from_pretrained(tmp_path, dtype=torch.float32, device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded.config.dtype == torch.float32
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32  # computed, not stored


def test_dtypes_that_are_none(tmp_path):
    for dtype in ("bfloat16", torch.int8):
        with pytest.raises(TypeError, match=r"dtype must be a floating-point torch\.dtype"):
            fsc.from_pretrained(tmp_path, dtype=dtype)


def test_a_loaded_checkpoint_keeps_its_method(tmp_path):
    model = compressed("bert")
    model.bert.encoder.layer[0].output.dense.method = "asvd"
    fsc.save_pretrained(model, tmp_path)
    loaded = fsc.from_pretrained(tmp_path)
    assert loaded.bert.encoder.layer[0].output.dense.method == "asvd"
    assert loaded.bert.encoder.layer[1].output.dense.method == "svd"


def test_loading_makes_no_dense_weight(tmp_path):
    model = compressed("llama", keep=0.4)
    fsc.save_pretrained(model, tmp_path)
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out.is_meta:
                seen.add(tuple(out.shape))
            return out

    with Watch():
        fsc.from_pretrained(tmp_path)
    assert (50, 24) in seen  # the embedding
    assert seen.isdisjoint({(24, 24), (40, 24), (24, 40), (24 * 24,), (24 * 40,)})


# ---- the directory ------------------------------------------------------------------------------


def contents(directory):
    return {f.name: f.read_bytes() for f in directory.iterdir()}


def test_other_files_stay_and_old_shards_go(tmp_path):
    fsc.save_pretrained(compressed("llama"), tmp_path, max_shard_size="8KB")
    (tmp_path / "tokenizer.json").write_text("mine")
    model = compressed("bert")
    fsc.save_pretrained(model, tmp_path)
    names = {f.name for f in tmp_path.iterdir()}
    assert {"tokenizer.json", "config.json", "model.safetensors"} <= names
    assert not any("-of-" in name or name.endswith("index.json") for name in names)
    assert (tmp_path / "tokenizer.json").read_text() == "mine"
    assert_same_logits(fsc.from_pretrained(tmp_path), model)


def test_the_mode_of_the_directory_stays(tmp_path):
    model, directory = compressed("bert"), tmp_path / "saved"
    fsc.save_pretrained(model, directory)
    directory.chmod(0o700)
    fsc.save_pretrained(model, directory)
    assert directory.stat().st_mode & 0o777 == 0o700


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    directory = tmp_path / "saved"
    (directory / "below").mkdir(parents=True)
    for place, target in ((directory, "."), (directory / "below", "..")):
        monkeypatch.chdir(place)
        with pytest.raises(ValueError, match="working directory"):
            fsc.save_pretrained(compressed("bert"), target)
    assert [f.name for f in directory.iterdir()] == ["below"]


def test_where_an_interrupted_write_has_left_the_old_model(tmp_path):
    for name in ("run[1]", "runs"):
        (tmp_path / f".{name}.1234.old").mkdir()
    assert interrupted(tmp_path / "run[1]") == tmp_path / ".run[1].1234.old"
    assert interrupted(tmp_path / "run") is None


def test_directories_of_others_are_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="other files"):
        fsc.save_pretrained(compressed("bert"), tmp_path)
    assert contents(tmp_path) == {"config.json": b"{}"}
    with pytest.raises(FileExistsError, match="is a file"):
        fsc.save_pretrained(compressed("bert"), tmp_path / "config.json")


@pytest.mark.parametrize("old", ["none", "empty", "ours"])
@pytest.mark.parametrize("call", ["safetensors.torch.save_file", "pathlib.Path.write_text"])
def test_a_failing_writer_leaves_what_was_there(call, old, tmp_path, monkeypatch):
    directory = tmp_path / "saved"
    if old == "empty":
        directory.mkdir()
    if old == "ours":
        fsc.save_pretrained(compressed("llama"), directory)
    before = contents(directory) if directory.exists() else None

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(call, full)
    with pytest.raises(OSError, match="no space left"):
        fsc.save_pretrained(compressed("bert"), directory)
    assert [f.name for f in tmp_path.iterdir()] == ([] if before is None else ["saved"])
    assert before is None or contents(directory) == before


def test_a_failing_rename_leaves_what_was_there(tmp_path, monkeypatch):
    from pathlib import Path

    directory = tmp_path / "saved"
    fsc.save_pretrained(compressed("llama"), directory)
    before, rename = contents(directory), Path.rename

    def failing(self, target):
        if self.name.endswith(".new"):
            raise OSError("gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="gone"):
        fsc.save_pretrained(compressed("bert"), directory)
    assert contents(directory) == before
    assert [f.name for f in tmp_path.iterdir()] == ["saved"]


def test_a_writer_that_is_killed_leaves_the_old_model_whole(tmp_path):
    """Between the two renames, the one moment at which nothing is in the place itself."""
    directory, model = tmp_path / "saved", compressed("llama")
    fsc.save_pretrained(model, directory)
    script = f"""
import os, sys
from pathlib import Path
from flashsvd_compile.checkpoints.replacing import replacing
rename = Path.rename
Path.rename = lambda self, to: os._exit(9) if self.suffix == ".new" else rename(self, to)
with replacing(Path({str(directory)!r}), lambda name: True) as new:
    (new / "model.safetensors").write_text("half")
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    with pytest.raises(FileNotFoundError, match=r"what was there before is at (.*)") as error:
        fsc.from_pretrained(directory)
    old = str(error.value).rpartition(" at ")[2]
    assert_same_logits(fsc.from_pretrained(old), model)


# ---- what cannot be saved or loaded -------------------------------------------------------------


def test_models_that_cannot_be_said(tmp_path):
    with pytest.raises(TypeError, match="got Linear"):
        fsc.save_pretrained(nn.Linear(2, 3), tmp_path / "saved")
    model = compressed("bert")
    model.bert.pooler = nn.Sequential(nn.Linear(24, 3), nn.Linear(3, 24))
    with pytest.raises(fsc.CheckpointError, match=r"bert\.pooler is a Sequential"):
        fsc.save_pretrained(model, tmp_path / "saved")
    model = compressed("bert")
    model.bert.register_buffer("extra", torch.ones(3))
    with pytest.raises(fsc.CheckpointError, match=r"bert is a BertModel, which neither"):
        fsc.save_pretrained(model, tmp_path / "saved")
    with torch.device("meta"):
        model = type(model)(model.config)
    with pytest.raises(fsc.CheckpointError, match="on the meta device"):
        fsc.save_pretrained(model, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


class MyBert(FAMILIES["bert"][0]):
    pass


def test_classes_of_ones_own_are_loaded_with_a_base(tmp_path):
    model = MyBert(FAMILIES["bert"][1]()).double().eval()
    fsc.compress_(model, keep=0.5)
    fsc.save_pretrained(model, tmp_path)
    with pytest.raises(fsc.CheckpointError, match=r"none of the architectures \['MyBert'\]"):
        fsc.from_pretrained(tmp_path)
    loaded = fsc.load_checkpoint(tmp_path, base=MyBert(model.config))
    assert type(loaded) is MyBert
    assert_same_logits(loaded, model)
    model.__class__ = type("BertModel", (MyBert,), {})
    with pytest.raises(TypeError, match="BertModel, but not that of transformers"):
        fsc.save_pretrained(model, tmp_path)


@pytest.fixture(scope="module")
def compressed_bert():
    return compressed("bert")


@pytest.fixture
def saved_bert(compressed_bert, tmp_path):
    fsc.save_pretrained(compressed_bert, tmp_path)
    return tmp_path


def _changed(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config["flashsvd"])
    (directory / "config.json").write_text(json.dumps(config))


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(format_version=2), r"format_version 2 .* allowed are 1 to 1"),
        (lambda b: b["modules"][QUERY].update(kind="per_hat"),
         r"query has kind 'per_hat'.*nearest is 'per_head'"),
        (lambda b: b["modules"][QUERY].update(rank=99), r"query: rank must be in"),
        (lambda b: b["modules"][QUERY].update(rank="4"), r"query needs whole numbers"),
        (lambda b: b["modules"][QUERY].update(num_heads=2), r"query is \[24, 24\], which"),
        (lambda b: b["modules"][QUERY].update(rank=3),
         r"query\.u is \[3, 4, 24\], the model's is \[3, 3, 24\]"),
        (lambda b: b["modules"].update(bert={"kind": "matrix"}), r"bert is no linear"),
        (lambda b: b["modules"].pop(QUERY), r"no place for .*query\.u"),
        (lambda b: b.update(tied={"a": "b"}), r"no tensors for b"),
        (lambda b: b.update(tied={"a": []}), r"tied of the flashsvd block must be an object"),
        (lambda b: b.update(modules=[QUERY]), r"modules of the flashsvd block must be an object"),
        (lambda b: b["modules"].update({QUERY: "per_head"}), r"modules of .* with values of type"),
        (lambda b: b["modules"][QUERY].update(kind=[]), r"query has kind \[\]"),
        (lambda b: b["modules"][QUERY].update(bias="false"), r"query: bias must be true or false"),
    ],
)  # fmt: skip
def test_blocks_that_do_not_fit(change, message, saved_bert):
    _changed(saved_bert, change)
    with pytest.raises(fsc.CheckpointError, match=message):
        fsc.from_pretrained(saved_bert)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "a"}, "cannot make the model of .*hidden_size"),
        ({"num_attention_heads": 5}, "cannot make the model of .*heads"),
        ({"dtype": "no_dtype"}, "cannot make the model of .*no_dtype"),
        ({"model_type": 5}, "model_type must be a string, got 5"),
        ({"architectures": 5}, "architectures must be a list of names, got 5"),
    ],
)
def test_configs_that_are_damaged(change, message, saved_bert):
    file = saved_bert / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(fsc.CheckpointError, match=message):
        fsc.from_pretrained(saved_bert)


def test_other_directories(tmp_path):
    with pytest.raises(FileNotFoundError):
        fsc.from_pretrained(tmp_path / "none")
    with pytest.raises(fsc.CheckpointError, match="holds no weights"):
        fsc.from_pretrained(tmp_path)
    dense_model("bert").save_pretrained(tmp_path)
    with pytest.raises(fsc.CheckpointError, match=r"no config\.json with a flashsvd block"):
        fsc.from_pretrained(tmp_path)
    with pytest.raises(fsc.CheckpointError, match="format='native'"):
        fsc.load_checkpoint(tmp_path, format="native")
