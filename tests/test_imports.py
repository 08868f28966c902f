"""The arrows between rooms, read off the sources, and what an import loads."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import flashsvd_compile

PACKAGE = Path(flashsvd_compile.__file__).parent
TOP = "flashsvd_compile"


def _room(name: str) -> Path:
    return Path(next(iter(import_module(f"{TOP}.{name}").__path__)))


def _modules() -> dict[str, Path]:
    """Dotted name below the package → source file; kernels and lowering included."""
    places = {PACKAGE: "", _room("kernels"): "kernels.", _room("lowering"): "lowering."}
    found = {}
    for place, prefix in places.items():
        for path in place.rglob("*.py"):
            name = prefix + ".".join(path.relative_to(place).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = _modules()


def _imports(path: Path) -> set[str]:
    """Every module that the source imports, at the top or inside functions, in full."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {
                full if full.removeprefix(f"{TOP}.") in MODULES else str(node.module)
                for full in whole
            }
    return found


IMPORTS = {name: _imports(path) for name, path in MODULES.items()}


def _own(name: str) -> set[str]:
    """What a module imports of this package, without the package's name."""
    return {m.removeprefix(f"{TOP}.") for m in IMPORTS[name] if m.startswith(f"{TOP}.")}


def _within(room: str) -> list[str]:
    return sorted(name for name in MODULES if name == room or name.startswith(f"{room}."))


# room or module -> what it may import of this package, by prefix
ARROWS = {
    "backend": ["explanation", "report", "fingerprint", "pipeline", "options", "planner.budget"],
    "explanation": ["report", "totals", "measurement", "pipeline", "factoring.records", "memory",
                    "planner.device", "planner.named_devices", "options", "analysis.calls"],
    "report": ["totals", "pipeline", "analysis", "planner", "memory", "reason", "units"],
    "totals": ["measurement", "pipeline", "planner", "memory", "units"],
    "measurement": ["memory", "tuning.timing"],
    "fingerprint": ["options"],
    "pipeline": ["normalize", "factoring", "contest", "placement", "analysis", "planner", "memory",
                 "lowering", "tuning", "options", "fingerprint", "clock"],
    "clock": [],
    "contest": ["placement", "analysis", "planner", "tuning", "options", "reason"],
    "placement": ["analysis", "planner", "lowering"],
    "memory": ["memory", "analysis", "reason", "figure"],
    "normalize": [],
    "factoring": ["factoring", "analysis", "compress.linears", "compress.svd", "reason"],
    "figure": [],
    "units": [],
    "options": [],
    "reason": [],
    "analysis": ["analysis", "reason", "kernels.activations", "kernels.siblings_tiles"],
    "planner": [
        "planner", "memory", "analysis", "reason", "options",
        "kernels.attention_extents", "kernels.attention_tiles", "kernels.chain_tiles",
        "kernels.shared_memory",
        "kernels.feed_forward_tiles",
        "kernels.feed_forward_whole_tiles", "kernels.lifted_activation_tiles",
        "kernels.feed_forward_blocks", "kernels.siblings_tiles", "kernels.tiles",
        "kernels.tile_tables", "kernels.devices",
    ],
    "tuning": ["tuning", "analysis", "lowering.tiled"],
    "lowering": ["lowering", "analysis", "reason", "kernels"],
    "kernels": ["kernels"],
    "compress": ["compress", "options", "figure", "kernels.attention_extents",
                 "kernels.attention_tiles", "kernels.feed_forward_tiles"],
    "checkpoints": ["checkpoints", "compress", "options"],
    "latent_cache": ["latent_cache", "compress.modules", "compress.joint_modules"],
}  # fmt: skip


@pytest.mark.parametrize("room", ARROWS)
def test_imports_point_down(room):
    names = _within(room)
    assert names, f"no room {room}"
    wrong = {
        name: sorted(
            imported
            for imported in _own(name)
            if not any(imported == ok or imported.startswith(f"{ok}.") for ok in ARROWS[room])
        )
        for name in names
    }
    assert {name: imports for name, imports in wrong.items() if imports} == {}


def test_every_room_has_arrows():
    rooms = {name.split(".")[0] for name in MODULES} - {"__init__", ""}
    assert rooms == set(ARROWS)


def test_no_room_imports_what_measures_shows_or_tests_it():
    for name, imports in IMPORTS.items():
        assert not {m.split(".")[0] for m in imports} & {"bench", "examples", "tests"}, name


def test_kernels_import_torch_and_triton_only():
    allowed = {"torch", "triton", TOP, *sys.stdlib_module_names}
    for name in _within("kernels"):
        assert {m.split(".")[0] for m in IMPORTS[name]} <= allowed, name


def test_lowerings_do_not_import_each_other():
    shared = {"lowering.ops", "lowering.builder", "lowering.tiled"}
    for name in _within("lowering"):
        others = {m for m in _own(name) if m.startswith("lowering.")} - shared
        assert others == set(), name


def test_only_ops_meets_kernels():
    for name in _within("lowering"):
        kernels = {m for m in _own(name) if m.startswith("kernels")}
        assert name == "lowering.ops" or kernels == set(), name


def test_triton_stays_in_kernels_that_ops_imports_late():
    for name, imports in IMPORTS.items():
        if any(m.split(".")[0] == "triton" for m in imports):
            assert name.startswith("kernels."), name


def test_transformers_is_never_imported_at_the_top():
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] == "transformers" for n in names), name


def test_only_options_reads_the_environment():
    for name, path in MODULES.items():
        source = ast.parse(path.read_text())
        read = {n.attr for n in ast.walk(source) if isinstance(n, ast.Attribute)} & {
            "environ",
            "getenv",
            "environb",
        }
        assert name == "options" or not read, name


@pytest.mark.parametrize("room", ["kernels", "lowering"])
def test_rooms_are_no_top_level_packages(room):
    assert not (_room(room) / "__init__.py").exists()
    for name, imports in IMPORTS.items():
        assert not any(m.split(".")[0] == room for m in imports), f"{name} imports {room} bare"


def _loaded_by(statement: str) -> set[str]:
    """Names of all modules that a fresh process has loaded after ``statement``."""
    program = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.split())


def test_the_package_loads_neither_triton_nor_transformers():
    loaded = _loaded_by("import flashsvd_compile")
    assert not loaded & {"torch", "triton", "transformers"}


def test_the_backend_loads_no_kernel_that_needs_triton():
    """Torch itself loads Triton, where there is one; machines without it run the backend, too."""
    loaded = _loaded_by("from flashsvd_compile import *; import flashsvd_compile.backend")
    needs_triton = {f"{TOP}.{name}" for name, imports in IMPORTS.items()
                    if any(m.split(".")[0] == "triton" for m in imports)}  # fmt: skip
    assert needs_triton
    assert not loaded & needs_triton
    assert "transformers" not in loaded


def test_the_package_is_not_found_below_itself():
    """``TORCH_LOGS=+flashsvd_compile`` walks it, importing every package that it meets."""
    import pkgutil

    found = [m.name for m in pkgutil.walk_packages(flashsvd_compile.__path__, f"{TOP}.")]
    assert f"{TOP}.backend" in found
    assert f"{TOP}.{TOP}" not in found
    assert f"{TOP}.tests" not in found
    assert f"{TOP}.bench" not in found
    assert f"{TOP}.examples" not in found


def test_latent_cache_is_public_and_loads_transformers_when_asked_for():
    assert "LatentCache" in dir(flashsvd_compile)
    assert "LatentCache" not in flashsvd_compile.__all__
    assert flashsvd_compile.LatentCache.__module__ == f"{TOP}.latent_cache.cache"
    assert "transformers" in _loaded_by("from flashsvd_compile import LatentCache")


def test_public_names():
    for name in flashsvd_compile.__all__:
        assert getattr(flashsvd_compile, name).__module__.startswith(TOP)
    assert set(flashsvd_compile.__all__) <= set(dir(flashsvd_compile))
    with pytest.raises(AttributeError, match="no attribute 'compres_'"):
        _ = flashsvd_compile.compres_
