"""Run SVD-compressed transformers in rank space: ``torch.compile(model, backend="flashsvd")``.

The public names are loaded on first use, so importing the package imports neither Triton nor
transformers.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashsvd_compile.checkpoints.compressed import compress_checkpoint as compress_checkpoint
    from flashsvd_compile.checkpoints.errors import CheckpointError as CheckpointError
    from flashsvd_compile.checkpoints.load import from_pretrained as from_pretrained
    from flashsvd_compile.checkpoints.load import load_checkpoint as load_checkpoint
    from flashsvd_compile.checkpoints.save import save_pretrained as save_pretrained
    from flashsvd_compile.compress.compressing import compress_ as compress_
    from flashsvd_compile.compress.finetuning import finetune as finetune
    from flashsvd_compile.compress.merge import merge_ as merge_
    from flashsvd_compile.compress.retruncating import retruncate_ as retruncate_
    from flashsvd_compile.explanation import Explanation as Explanation
    from flashsvd_compile.explanation import explain as explain
    from flashsvd_compile.latent_cache.cache import LatentCache as LatentCache
    from flashsvd_compile.options import Options as Options
    from flashsvd_compile.planner.budget import BudgetError as BudgetError

__version__ = "0.1.0"

# name -> the module that defines it
_PUBLIC = {
    "BudgetError": "planner.budget",
    "CheckpointError": "checkpoints.errors",
    "Explanation": "explanation",
    "LatentCache": "latent_cache.cache",
    "Options": "options",
    "compress_": "compress.compressing",
    "compress_checkpoint": "checkpoints.compressed",
    "explain": "explanation",
    "finetune": "compress.finetuning",
    "from_pretrained": "checkpoints.load",
    "load_checkpoint": "checkpoints.load",
    "merge_": "compress.merge",
    "retruncate_": "compress.retruncating",
    "save_pretrained": "checkpoints.save",
}

# LatentCache is not among them: it cannot be loaded without transformers.
__all__ = [
    "BudgetError",
    "CheckpointError",
    "Explanation",
    "Options",
    "compress_",
    "compress_checkpoint",
    "explain",
    "finetune",
    "from_pretrained",
    "load_checkpoint",
    "merge_",
    "retruncate_",
    "save_pretrained",
]


def _adopt_rooms(root: Path) -> None:
    """In a source tree kernels/ and lowering/ stand beside this package: make them its own.

    A wheel has them inside. The root itself must not enter ``__path__``: this package would be
    found below itself, again and again, by whoever walks it (``TORCH_LOGS`` does).
    """
    rooms = [root / "kernels", root / "lowering"]
    if not all(room.is_dir() for room in rooms):
        return
    for room in rooms:
        spec = ModuleSpec(f"{__name__}.{room.name}", None, is_package=True)
        spec.submodule_search_locations = [str(room)]
        sys.modules[spec.name] = globals()[room.name] = module_from_spec(spec)


_adopt_rooms(Path(__file__).resolve().parent.parent)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
