"""The backend seen from ``torch.compile``: options, modes, fallback, files, logs."""

import json
import logging
import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from tests.spelled import OPTIONS, low_rank, no_pass_may_fail


class FeedForward(nn.Module):
    """One site that ``row_blocks`` takes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = low_rank(12, 40), low_rank(40, 12)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


pytestmark = pytest.mark.usefixtures("fresh_inference")


@pytest.fixture
def model():
    return FeedForward()


@pytest.fixture
def x():
    return torch.randn(5, 12)


def compiled(model, **options):
    return torch.compile(model, backend="flashsvd", options={**OPTIONS, **options})


def _ours(caplog):
    return [r for r in caplog.records if r.name.startswith("flashsvd_compile")]


# ---- from a process that has not imported the package --------------------------------------------

PROGRAM = """
import sys, torch
from torch import nn
torch.manual_seed(0)
low_rank = lambda i, o: nn.Sequential(nn.Linear(i, 4, bias=False), nn.Linear(4, o))
model = nn.Sequential(*low_rank(12, 40), nn.GELU(), *low_rank(40, 12))
x = torch.randn(5, 12)
assert "flashsvd" in torch.compiler.list_backends()
assert "flashsvd_compile.backend" not in sys.modules
options = {"compiler": "eager", "feed_forward": "row_blocks"}
with torch.no_grad():
    compiled = torch.compile(model, backend="flashsvd", options=options)
    torch.testing.assert_close(compiled(x), model(x))
assert "flashsvd_compile.backend" in sys.modules
print("right")
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Runs PROGRAM outside the source tree, with the logs on."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"TORCH_LOGS": "+flashsvd_compile"},
        cwd=tmp_path_factory.mktemp("elsewhere"),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_works_without_an_import(program):
    assert program.returncode == 0, program.stderr
    assert "right" in program.stdout


def test_torch_logs_tell_the_story(program):
    told = program.stderr
    assert "1 feed_forward row_blocks" in told
    for line in ("graph before", "graph after", "torch.ops.flashsvd.row_blocks_feed_forward"):
        assert line in told


# ---- options and modes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"options": {"atention": "unfused"}}, "the nearest is 'attention'"),
        ({"options": {"attention": "fused"}}, "the nearest is 'unfused'"),
        ({"options": {"sram_budget": "many"}}, "no unit 'many'"),
        ({"mode": "max_autotune"}, "the nearest is 'max-autotune'"),
    ],
    ids=["name", "value", "bytes", "mode"],
)
def test_mistakes_reach_the_user(arguments, told, model, x):
    with pytest.raises(BackendCompilerFailed, match="flashsvd") as error:
        torch.compile(model, backend="flashsvd", **arguments)(x)
    assert told in str(error.value)


def test_mode_and_options_together_are_refused_by_torch(model):
    with pytest.raises(RuntimeError, match="mode or options"):
        torch.compile(model, backend="flashsvd", mode="max-autotune", options={"max_autotune": 1})


@pytest.mark.parametrize(
    ("arguments", "patches"),
    [
        ({"mode": "reduce-overhead"}, {"triton.cudagraphs": True}),
        ({"mode": "max-autotune-no-cudagraphs"}, {"max_autotune": True}),
        ({"options": {"max_autotune": True}}, {"max_autotune": True}),
        ({"options": {"epilogue-fusion": False}}, {"epilogue_fusion": False}),
        ({}, {}),
    ],
    ids=["reduce-overhead", "max-autotune", "option", "dashes", "nothing"],
)
def test_inductor_gets_its_options(arguments, patches, model, x):
    with patch(
        "torch._inductor.compile_fx.compile_fx", side_effect=lambda gm, *_, **__: gm.forward
    ) as compile_fx:
        result = torch.compile(model, backend="flashsvd", **arguments)(x)
    torch.testing.assert_close(result, model(x))
    given = dict(compile_fx.call_args.kwargs["config_patches"])
    marked = given.pop("unsafe_marked_cacheable_functions")
    assert set(marked) == {"flashsvd_compile"}
    assert given.items() >= patches.items()
    if "mode" not in arguments:
        assert given == patches


def test_the_users_own_marked_functions_stay(model, x):
    with patch(
        "torch._inductor.compile_fx.compile_fx", side_effect=lambda gm, *_, **__: gm.forward
    ) as compile_fx:
        options = {"unsafe_marked_cacheable_functions": {"theirs": "1"}}
        torch.compile(model, backend="flashsvd", options=options)(x)
    marked = compile_fx.call_args.kwargs["config_patches"]["unsafe_marked_cacheable_functions"]
    assert set(marked) == {"theirs", "flashsvd_compile"}
    assert options == {"unsafe_marked_cacheable_functions": {"theirs": "1"}}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_other_compilers_leave_inductor_alone(compiler, model, x):
    with patch("torch._inductor.compile_fx.compile_fx", side_effect=AssertionError):
        result = compiled(model, compiler=compiler)(x)
    torch.testing.assert_close(result, model(x))


def test_inductor_compiles_the_rewritten_graph(model, x, tmp_path):
    with no_pass_may_fail():
        result = compiled(model, compiler="inductor", debug_dir=tmp_path)(x)
    torch.testing.assert_close(result, model(x))
    assert "flashsvd.row_blocks" in (tmp_path / "graph_0" / "after.py").read_text()


# ---- a pass fails -------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("failing", ["normalize", "find_sites", "plan_site", "Placement"])
def test_a_failing_pass_leaves_the_graph_as_it_was(failing, compiler, model, x, caplog):
    broken = patch(f"flashsvd_compile.pipeline.{failing}", side_effect=ValueError("broken pass"))
    with broken, caplog.at_level(logging.WARNING, "flashsvd_compile"):
        result = compiled(model, compiler=compiler)(x)
    assert torch.equal(result, model(x))
    (warning,) = _ours(caplog)
    assert warning.levelno == logging.WARNING
    for part in ("Please report this", "broken pass", "Traceback", failing):
        assert part in warning.getMessage()


def test_a_failure_on_the_way_leaves_no_trace(model, x, caplog):
    """A pass that fails after others rewrote: what they wrote is thrown away as a whole."""
    from flashsvd_compile.placement import Placement

    two, put, plans = nn.Sequential(model, FeedForward()), Placement.put, []

    def fails_at_the_last_site(placement, plan):
        plans.append(plan)
        if len(plans) > 1:
            raise ValueError("broken")
        return put(placement, plan)

    with patch.object(Placement, "put", fails_at_the_last_site):
        result = compiled(two)(x)
    assert torch.equal(result, two(x))
    assert len(_ours(caplog)) == 1


def test_an_error_in_the_rewritten_graph_is_not_silent(model, x):
    from flashsvd_compile.lowering import ops

    def misuse(site, builder, block_rows, tile):
        return builder.call(ops.row_blocks_feed_forward_op, *[site.node.args[1]] * 3,
                            activation="gelu", block_rows=0, tile=tile)  # fmt: skip

    with (
        patch("flashsvd_compile.placement.lower_row_blocks", misuse),
        pytest.raises(Exception, match=r"."),
    ):
        compiled(model)(x)


# ---- files and logs -----------------------------------------------------------------------------


def test_debug_dir(model, x, tmp_path):
    directory = tmp_path / "not" / "there"
    run = compiled(model, debug_dir=directory)
    run(x)
    run(torch.randn(7, 12))
    names = ["after.py", "before.py", "memory.png", "report.txt", "sites.json"]
    assert sorted(p.name for p in directory.iterdir()) == ["graph_0", "graph_1"]
    for graph in directory.iterdir():
        assert sorted(p.name for p in graph.iterdir()) == names
    before = (directory / "graph_0" / "before.py").read_text()
    after = (directory / "graph_0" / "after.py").read_text()
    assert "aten.gelu" in before
    assert "flashsvd" not in before
    assert "aten.gelu" not in after
    assert "flashsvd.row_blocks_feed_forward" in after
    record = json.loads((directory / "graph_0" / "sites.json").read_text())
    assert set(record["seconds"]) == {
        "normalize", "walk", "analysis", "plan", "rewrite", "measure",
    }  # fmt: skip
    (site,) = [s for s in record["sites"] if s["kind"] == "feed_forward"]
    assert site["lowering"] == "row_blocks"
    assert site["plan"]["ranks"] == {"up": "4", "down": "4"}
    report = (directory / "graph_0" / "report.txt").read_text()
    assert "row_blocks" in report
    assert "passes took" in report


def test_logs_are_quiet_by_default(model, x, caplog):
    compiled(model)(x)
    assert _ours(caplog) == []


def test_logs(model, x, caplog):
    with caplog.at_level(logging.DEBUG, "flashsvd_compile"):
        compiled(model)(x)
    told = _ours(caplog)
    assert [r.levelname for r in told] == ["INFO", "DEBUG", "DEBUG", "DEBUG"]
    assert "1 feed_forward row_blocks" in told[0].getMessage()
    for name in ("normalize", "analysis", "plan", "rewrite", "measure"):
        assert f"{name} " in told[0].getMessage()
