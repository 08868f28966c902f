"""`compress_checkpoint` makes what `compress_` and `save_pretrained` make, without their memory."""

import shutil

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import flashsvd_compile as fsc
from flashsvd_compile.compress import streaming
from flashsvd_compile.memory.measured import _allocations, _peak

transformers = pytest.importorskip("transformers")
from tests.checkpoints.written import FAMILIES, dense_model, logits  # noqa: E402


@pytest.fixture
def calibration():
    torch.manual_seed(1)
    lengths = [9, 7, 5, 8]
    return [
        {
            "input_ids": torch.randint(0, 50, (3, length)),
            "attention_mask": (torch.arange(length) < torch.tensor([[length], [4], [length - 1]])),
        }
        for length in lengths
    ]


def written(model, directory, max_shard_size="5GB"):
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


@pytest.mark.parametrize("is_calibrated", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_as_in_memory(family, is_calibrated, calibration, tmp_path):
    model = dense_model(family)
    source = written(model, tmp_path / "dense", "20KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    how = {"method": "whitened", "calibration": calibration} if is_calibrated else {}
    report = fsc.compress_checkpoint(source, tmp_path / "low", 0.6, max_shard_size="20KB", **how)
    assert len(list((tmp_path / "low").glob("*.safetensors"))) > 1
    assert sorted(x.name for x in tmp_path.iterdir()) == ["dense", "low"]

    expected = fsc.compress_(model, keep=0.6, **how)
    assert [(r.path, r.kind, r.rank, r.reason) for r in report.rows] == [
        (r.path, r.kind, r.rank, r.reason) for r in expected.rows
    ]
    assert any(row.rank for row in report.rows)
    assert (report.method, report.model_bytes_before) == ("whitened" if how else "svd",
                                                          expected.model_bytes_before)  # fmt: skip
    assert report.model_bytes_after == expected.model_bytes_after
    loaded = fsc.from_pretrained(tmp_path / "low")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert len(list(loaded.parameters())) == len(list(model.parameters()))  # what was tied is
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(loaded), logits(dense_model(family)), rtol=1e-3)


def test_patterns_and_budgets(tmp_path):
    model = dense_model("bert")
    source = written(model, tmp_path / "dense")
    most = int(0.8 * 8 * sum(p.numel() for p in model.parameters()))
    given = {"include": ["*layer.0*", "*layer.1*"], "exclude": ["*query"], "sram_budget": "48KiB",
             "weight_budget": most}  # fmt: skip
    report = fsc.compress_checkpoint(source, tmp_path / "low", **given)
    assert report.rows == fsc.compress_(model, **given).rows
    assert report.model_bytes_after <= most


def test_memory_is_that_of_a_layer_and_not_of_the_model(tmp_path):
    def held(num_layers):
        """Beyond the mapped file, which counts as allocated."""
        config = transformers.LlamaConfig(
            hidden_size=128, intermediate_size=256, num_attention_heads=4, vocab_size=200,
            num_hidden_layers=num_layers,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        source = written(model, tmp_path / f"dense{num_layers}")
        batches = [torch.randint(0, 200, (2, 16)) for _ in range(2)]
        how = {"method": "whitened", "calibration": batches, "max_shard_size": "100KB"}
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            fsc.compress_checkpoint(source, tmp_path / f"low{num_layers}", **how)
        (file,) = source.glob("*.safetensors")
        return _peak(_allocations(recorded)) - file.stat().st_size, model.get_memory_footprint()

    (few, small), (many, large) = held(2), held(8)
    assert large > 2 * small
    assert many < 1.02 * few


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_the_target_as_it_was(error, monkeypatch, tmp_path):
    source = written(dense_model("llama"), tmp_path / "dense")
    fsc.compress_checkpoint(source, tmp_path / "low", 0.7)
    before = {file.name: file.read_bytes() for file in (tmp_path / "low").iterdir()}
    factored, seen = streaming.factored, []

    def interrupted(*args):
        seen.append(args)
        if len(seen) == 5:
            raise error
        return factored(*args)

    monkeypatch.setattr(streaming, "factored", interrupted)
    for target in ("low", "new"):
        seen.clear()
        with pytest.raises(error):
            fsc.compress_checkpoint(source, tmp_path / target, 0.4, max_shard_size="4KB")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["dense", "low"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "low").iterdir()} == before


def test_what_cannot_be_done_is_told(calibration, tmp_path):
    source = written(dense_model("llama"), tmp_path / "dense")
    for method in ("planned", "fwsvd", "whitend"):
        with pytest.raises(ValueError, match=r"allowed: svd, whitened"):
            fsc.compress_checkpoint(source, tmp_path / "low", method=method, calibration=[])
    with pytest.raises(ValueError, match="calibration holds no batch"):
        fsc.compress_checkpoint(source, tmp_path / "low", calibration=[])
    with pytest.raises(ValueError, match="needs calibration"):
        fsc.compress_checkpoint(source, tmp_path / "low", method="whitened")
    with pytest.raises(ValueError, match="keep must be in"):
        fsc.compress_checkpoint(source, tmp_path / "low", 1.5)
    with pytest.raises(FileNotFoundError):
        fsc.compress_checkpoint(tmp_path / "none", tmp_path / "low")
    fsc.compress_checkpoint(source, tmp_path / "low")
    with pytest.raises(fsc.CheckpointError, match="low-rank already"):
        fsc.compress_checkpoint(tmp_path / "low", tmp_path / "lower")
    with pytest.raises(FileExistsError, match="other files"):
        fsc.compress_checkpoint(source, source)
    shutil.rmtree(tmp_path / "low")

    config = transformers.AlbertConfig(  # one layer, called again and again
        hidden_size=24, num_attention_heads=3, intermediate_size=40, vocab_size=50,
        embedding_size=24, num_hidden_layers=2, num_hidden_groups=1,
    )  # fmt: skip
    source = written(transformers.AlbertModel(config), tmp_path / "albert")
    with pytest.raises(ValueError, match="no blocks that are called one after another"):
        fsc.compress_checkpoint(source, tmp_path / "low", calibration=calibration)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["albert", "dense"]


def test_linears_in_several_places_are_not_calibrated(tmp_path):
    """Each place reads something else, and the first would be gone when the next one runs."""

    def model():
        made = dense_model("llama")
        made.model.layers[1].mlp = made.model.layers[0].mlp
        return made

    written(dense_model("llama"), tmp_path / "dense")  # for its config.json
    (file,) = (tmp_path / "dense").glob("*.safetensors")
    file.unlink()
    torch.save(model().state_dict(), tmp_path / "dense" / "pytorch_model.bin")
    batches = [torch.randint(0, 50, (2, 7)) for _ in range(2)]
    report = fsc.compress_checkpoint(
        tmp_path / "dense", tmp_path / "low", 0.6, base=model(), calibration=batches
    )
    shared = {row.path: row.reason for row in report.rows if "mlp" in row.path}
    assert set(shared) == {f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")}
    assert all("several places" in reason for reason in shared.values())
    expected = model()
    fsc.compress_(expected, 0.6, exclude=["*mlp*"], method="whitened", calibration=batches)
    loaded = fsc.load_checkpoint(tmp_path / "low", base=model())
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=1e-4, atol=1e-5)


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = dense_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 4] = float("nan")
    source = written(model, tmp_path / "dense")
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc: .*not finite"):
        fsc.compress_checkpoint(source, tmp_path / "low")
    assert not (tmp_path / "low").exists()
