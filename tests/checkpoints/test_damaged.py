"""Checkpoints that are damaged, mislabelled or pickled: every error names what is wrong."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import flashsvd_compile as fsc

pytest.importorskip("transformers")
from tests.checkpoints.written import (
    assert_same_logits,
    dense_model,
    make_product_,
    rest_of,
    write,
)

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def written(tmp_path):
    """Writes a Llama with one linear in ASVD's layout, after a change to its tensors."""
    dense = dense_model("llama")
    down, up = make_product_(dense.get_submodule(UP), 5)
    tensors = rest_of(dense, UP) | {f"{UP}.BLinear.weight": down, f"{UP}.ALinear.weight": up}

    def save(change=lambda tensors: None):
        change(tensors)
        write(tmp_path, dense, tensors)
        return tmp_path

    save.dense, save.tensors = dense, tensors
    return save


@pytest.mark.parametrize("share", [0.9, 0.5, 0.01])
def test_truncated_safetensors(share, written):
    file = written() / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    expected = r"within its header" if share < 0.1 else r"ends within or before \w+\.\w+"
    with pytest.raises(fsc.CheckpointError, match=expected):
        fsc.load_checkpoint(file.parent)


def test_a_header_that_is_none(written):
    file = written() / "model.safetensors"
    for header in (b"[]", b"[" * 100_000):
        file.write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(fsc.CheckpointError, match=r"model\.safetensors is damaged"):
            fsc.load_checkpoint(file.parent)


def test_truncated_pickle(written, tmp_path):
    file = tmp_path / "weights.pt"
    torch.save(written.tensors, file)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(fsc.CheckpointError, match=r"weights\.pt is damaged"):
        fsc.load_checkpoint(file, base=written.dense)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(fsc.CheckpointError, match=r"weights\.pt"):
        fsc.load_checkpoint(file, base=written.dense)


def _pop(name):
    return lambda tensors: tensors.pop(name)


def _set(name, *shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=torch.float64)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_pop(f"{UP}.ALinear.weight"), rf"{UP}\.BLinear\.weight has no counterpart, the up factor"),
        (_pop(f"{UP}.BLinear.weight"), r"no counterpart, the down factor"),
        (_set(f"{UP}.BLinear.weight", 6, 24), r"up_proj is \[40, 24\].*BLinear.weight \[6, 24\]"),
        (_set(f"{UP}.ALinear.weight", 40, 5, 1), r"ALinear\.weight \[40, 5, 1\] must be matrices"),
        (_set(f"{UP}.ALinear.bias", 39), r"ALinear\.bias is \[39\], expected 40"),
        (_set(f"{UP}.BLinear.bias", 6), r"BLinear\.bias is \[6\], expected \[5\]"),
        (_pop("model.norm.weight"), r"no tensors for model\.norm\.weight"),
        (_set("model.norn.weight", 24), r"no place for model\.norn\.weight"),
        (_set("model.norm.weight", 23), r"model\.norm\.weight is \[23\], the model's is \[24\]"),
        (_set(f"{UP}.weight", 40, 24), rf"no place for {UP}\.weight"),
        (
            lambda t: t.update({f"{UP}.BLinear.weight": torch.zeros(5, 24, dtype=torch.int8)}),
            r"BLinear\.weight is int8, expected floating-point",
        ),
        (_set(f"{UP}.BLinear.weight"), r"BLinear\.weight \[\].* must be matrices"),
        (
            lambda t: t.update({f"{UP}.ALinear.bias": torch.zeros(40, dtype=torch.int64)}),
            r"ALinear\.bias is int64, expected floating-point",
        ),
        (
            lambda t: t.update({f"{UP}.BLinear.weight": torch.ones(5, 24).to(torch.float8_e5m2)}),
            r"BLinear\.weight is float8_e5m2, expected floating-point",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(24, dtype=torch.int8)}),
            r"model\.norm\.weight is int8, the model's is float",
        ),
    ],
)
def test_tensors_that_do_not_fit(change, message, written):
    with pytest.raises(fsc.CheckpointError, match=message):
        fsc.load_checkpoint(written(change))


def test_what_old_releases_stored_is_ignored(written):
    path = written(_set("model.layers.0.self_attn.rotary_emb.inv_freq", 4))
    assert_same_logits(fsc.load_checkpoint(path), written.dense)


def test_formats_that_are_not(written):
    path = written()
    with pytest.raises(ValueError, match=r"format must be one of .*nearest is 'svdllm'"):
        fsc.load_checkpoint(path, format="svd-llm")
    with pytest.raises(fsc.CheckpointError, match=r"format='palu'.* those of 'asvd'.*BLinear"):
        fsc.load_checkpoint(path, format="palu")
    with pytest.raises(fsc.CheckpointError, match=r"format='dobisvd'.*shapes of 'asvd'"):
        fsc.load_checkpoint(path, format="dobisvd")
    fsc.save_pretrained(fsc.load_checkpoint(path), path / "saved")
    with pytest.raises(fsc.CheckpointError, match=r"format='asvd'.*'native'"):
        fsc.load_checkpoint(path / "saved", format="asvd")


def test_two_tensors_for_one_place(written):
    """With the base model's prefix and without."""
    directory = written(_set("norm.weight", 24))
    with pytest.raises(fsc.CheckpointError, match=r"norm\.weight and .*norm\.weight are for one"):
        fsc.load_checkpoint(directory)


def test_names_without_the_base_models_prefix(tmp_path):
    dense = dense_model("llama")
    down, up = make_product_(dense.get_submodule(UP), 5)
    tensors = rest_of(dense, UP) | {f"{UP}.BLinear.weight": down, f"{UP}.ALinear.weight": up}
    write(tmp_path, dense, {k.removeprefix("model."): v for k, v in tensors.items()})
    assert_same_logits(fsc.load_checkpoint(tmp_path), dense)


def test_a_bias_that_is_missing(tmp_path):
    dense = dense_model("opt")
    path = "model.decoder.layers.0.fc1"
    down, up = make_product_(dense.get_submodule(path), 5)
    tensors = rest_of(dense, path, biases=False)
    tensors |= {f"{path}.BLinear.weight": down, f"{path}.ALinear.weight": up}
    write(tmp_path, dense, tensors)
    with pytest.raises(fsc.CheckpointError, match=r"fc1 has a bias in the model"):
        fsc.load_checkpoint(tmp_path)


@pytest.mark.parametrize("format", ["asvd", "dobisvd"])
@pytest.mark.parametrize("told_by", ["another linear", "format", "nothing"])
def test_shapes_that_leave_both_orders(format, told_by, written):
    """A square linear of full rank: other linears tell what letters mean, or the user does."""
    down, up = ("BLinear", "ALinear") if format == "asvd" else ("ALinear", "BLinear")
    path = "model.layers.0.self_attn.q_proj"
    factors = dict(zip((down, up), make_product_(written.dense.get_submodule(path), 24),
                       strict=True))  # fmt: skip
    change = {f"{path}.{name}.weight": factor for name, factor in factors.items()}
    other_down = written.tensors.pop(f"{UP}.BLinear.weight")
    other_up = written.tensors.pop(f"{UP}.ALinear.weight")
    if told_by == "another linear":
        change |= {f"{UP}.{down}.weight": other_down, f"{UP}.{up}.weight": other_up}
    else:
        change[f"{UP}.weight"] = other_up @ other_down
    written.tensors.pop(f"{path}.weight")
    directory = written(lambda tensors: tensors.update(change))
    if told_by == "nothing":
        with pytest.raises(fsc.CheckpointError, match=r"q_proj: .* in either order; name the"):
            fsc.load_checkpoint(directory)
        return
    loaded = fsc.load_checkpoint(directory, format=format if told_by == "format" else "auto")
    assert_same_logits(loaded, written.dense)
    if told_by == "another linear":
        wrong = "dobisvd" if format == "asvd" else "asvd"
        with pytest.raises(fsc.CheckpointError, match=f"have the shapes of '{format}'"):
            fsc.load_checkpoint(directory, format=wrong)


def test_letters_that_shapes_contradict_decide_nothing(written):
    """One format has these names, but where shapes tell, its up factor is called the down one."""
    path = "model.layers.0.self_attn.q"
    square = torch.eye(24, dtype=torch.float64)
    for name in (f"{UP}.BLinear.weight", f"{UP}.ALinear.weight", f"{path}_proj.weight"):
        written.tensors.pop(name)
    stem = UP.removesuffix("_proj")
    change = {
        f"{path}_v_proj.weight": square, f"{path}_u_proj.weight": square.clone(),
        f"{stem}_v_proj.weight": torch.ones(40, 5), f"{stem}_u_proj.weight": torch.ones(5, 24),
    }  # fmt: skip
    with pytest.raises(fsc.CheckpointError, match=r"q_proj: .* in either order"):
        fsc.load_checkpoint(written(lambda tensors: tensors.update(change)))


def test_names_that_safetensors_keeps_in_its_metadata(written):
    """Of tensors that share memory its `save_model` stores one."""
    written.dense.lm_head.weight.data.copy_(written.dense.model.embed_tokens.weight)
    directory = written(_pop("lm_head.weight"))
    save_file({k: v.contiguous() for k, v in written.tensors.items()},
              directory / "model.safetensors",
              metadata={"lm_head.weight": "model.embed_tokens.weight"})  # fmt: skip
    assert_same_logits(fsc.load_checkpoint(directory), written.dense)


def test_a_dense_checkpoint_is_none(tmp_path):
    dense_model("llama").save_pretrained(tmp_path)
    with pytest.raises(fsc.CheckpointError, match="no factors found"):
        fsc.load_checkpoint(tmp_path)


def test_groups_that_do_not_make_up_their_factor(written):
    path = "model.layers.0.self_attn.q_proj"
    groups = {f"{path}.U.{g}.weight": torch.zeros(8, 2, dtype=torch.float64) for g in range(3)}
    down = {f"{path}.VT.weight": torch.zeros(7, 24, dtype=torch.float64)}
    for name in (f"{UP}.BLinear.weight", f"{UP}.ALinear.weight", f"{path}.weight"):
        written.tensors.pop(name)
    with pytest.raises(fsc.CheckpointError, match=r"do not make up .*VT\.weight"):
        fsc.load_checkpoint(written(lambda t: t.update(groups | down)))
    with pytest.raises(fsc.CheckpointError, match=r"groups 0, 2; one before the last is missing"):
        fsc.load_checkpoint(written(_pop(f"{path}.U.1.weight")))


# ---- several files ------------------------------------------------------------------------------


def _sharded(written, tmp_path, forget=()):
    written()
    (tmp_path / "model.safetensors").unlink()
    names = sorted(written.tensors)
    weight_map = {name: f"model-{i % 2 + 1}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        held = {k: written.tensors[k].contiguous() for k in names
                if weight_map[k] == file and k not in forget}  # fmt: skip
        save_file(held, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def test_shards(written, tmp_path):
    index = _sharded(written, tmp_path)
    assert_same_logits(fsc.load_checkpoint(tmp_path), written.dense)
    assert_same_logits(fsc.load_checkpoint(index), written.dense)


def test_shards_that_are_missing_or_lack_a_tensor(written, tmp_path):
    index = _sharded(written, tmp_path, forget=["model.norm.weight"])
    with pytest.raises(fsc.CheckpointError, match=r"lacks model\.norm\.weight"):
        fsc.load_checkpoint(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(fsc.CheckpointError, match=r"model-2\.safetensors is missing.*hold \w+"):
        fsc.load_checkpoint(tmp_path)
    index.write_text('{"weight_map": {"a": "../b.safetensors"}}')
    with pytest.raises(fsc.CheckpointError, match="puts a into"):
        fsc.load_checkpoint(tmp_path)


def test_an_index_of_files_that_were_not_fetched(written):
    directory = written()
    index = {"weight_map": dict.fromkeys(written.tensors, "pytorch_model-00001-of-00001.bin")}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same_logits(fsc.load_checkpoint(directory), written.dense)


def test_a_whole_file_beside_an_index_of_others(written, tmp_path):
    _sharded(written, tmp_path)
    save_file({k: v.contiguous() for k, v in written.tensors.items()},
              tmp_path / "model.safetensors")  # fmt: skip
    with pytest.raises(fsc.CheckpointError, match=r"holds model\.safetensors and model\..*index"):
        fsc.load_checkpoint(tmp_path)
    for file in ("model.safetensors", "model.safetensors.index.json"):
        assert_same_logits(fsc.load_checkpoint(tmp_path / file), written.dense)


# ---- pickles ------------------------------------------------------------------------------------


class Traitor:
    ran = False

    def __reduce__(self):
        return (setattr, (Traitor, "ran", True))


@pytest.mark.parametrize("kind", ["model", "code", "plain"])
def test_pickles_of_objects_are_refused_and_not_run(kind, written, tmp_path):
    file = tmp_path / "whole_model.pt"
    if kind == "model":
        torch.save({"model": nn.Linear(2, 3), "tokenizer": None}, file)
    elif kind == "code":
        torch.save({"a": Traitor()}, file)
    else:
        file.write_bytes(pickle.dumps(Traitor(), protocol=2))
    with pytest.raises(fsc.CheckpointError, match=r"(?s)whole_model\.pt.*safetensors"):
        fsc.load_checkpoint(file, base=written.dense)
    assert not Traitor.ran


def test_the_conversion_that_the_error_tells_works(written, tmp_path, monkeypatch):
    """A model whose linear is two, as a tool would pickle it."""
    model = dense_model("llama")
    down, up = (nn.Linear(24, 5, bias=False), nn.Linear(5, 40, bias=False))
    down.weight.data = written.tensors[f"{UP}.BLinear.weight"]
    up.weight.data = written.tensors[f"{UP}.ALinear.weight"]
    model.set_submodule(UP, nn.ModuleDict({"BLinear": down, "ALinear": up}))
    file = tmp_path / "whole.pt"
    torch.save({"model": model, "tokenizer": None}, file)
    with pytest.raises(fsc.CheckpointError) as error:
        fsc.load_checkpoint(file, base=written.dense)
    script = str(error.value).split(":\n\n")[1]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line.strip() for line in script.splitlines()), {})
    assert_same_logits(fsc.load_checkpoint(Path("model.safetensors")), written.dense)


def test_state_dicts_below_a_name(written, tmp_path):
    file = tmp_path / "weights.bin"
    torch.save({"state_dict": written.tensors, "epoch": 3}, file)
    assert_same_logits(fsc.load_checkpoint(file, base=written.dense), written.dense)
    torch.save(written.tensors | {"epoch": 3}, file)
    with pytest.raises(fsc.CheckpointError, match="epoch should be dense tensors"):
        fsc.load_checkpoint(file, base=written.dense)
    torch.save(written.tensors, file, _use_new_zipfile_serialization=False)
    assert_same_logits(fsc.load_checkpoint(file, base=written.dense), written.dense)


def test_tensors_without_values_of_their_own(written, tmp_path):
    file, name = tmp_path / "weights.pt", f"{UP}.BLinear.weight"
    for tensor in (written.tensors[name].to_sparse(), written.tensors[name].to("meta")):
        torch.save(written.tensors | {name: tensor}, file)
        with pytest.raises(fsc.CheckpointError, match=r"BLinear\.weight should be dense"):
            fsc.load_checkpoint(file, base=written.dense)


# ---- code that a config names -------------------------------------------------------------------


def test_code_beside_a_base_is_not_run_whoever_agrees(written, tmp_path, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}})
    )
    (base / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass OwnConfig: ...\n")
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    with pytest.raises(ValueError, match="custom code"):
        fsc.load_checkpoint(written(), base=base)
    assert not (tmp_path / "ran").exists()


def test_kernels_that_a_config_names_are_not_fetched(written):
    directory = written()
    config = json.loads((directory / "config.json").read_text())
    config |= {"attn_implementation": "someone/kernel", "experts_implementation": "someone/kernel"}
    (directory / "config.json").write_text(json.dumps(config))
    for base in (None, directory):
        loaded = fsc.load_checkpoint(directory, base=base)
        assert_same_logits(loaded, written.dense)
        assert loaded.config._attn_implementation != "someone/kernel"


# -------------------------------------------------------------------------------------------------


def test_dobi_svds_8_bit_codes_are_refused(written):
    directory = written()
    torch.save({}, directory / "remapping_weight.pt")
    with pytest.raises(fsc.CheckpointError, match="8 bits"):
        fsc.load_checkpoint(directory)


def test_a_missing_package_is_told(written, monkeypatch):
    directory = written()
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install \"flashsvd_compile\[checkpoints\]\""):
        fsc.load_checkpoint(directory)
