"""Run SVD-compressed transformers in rank space: ``torch.compile(model, backend="flashsvd")``.

The public names are loaded on first use, so importing the package imports neither Triton nor
transformers.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashsvd_compile.compress.svd import compress_ as compress_
    from flashsvd_compile.explain import Explanation as Explanation
    from flashsvd_compile.explain import explain as explain
    from flashsvd_compile.options import Options as Options

__version__ = "0.1.0"

# name -> the module that defines it
_PUBLIC = {
    "Explanation": "explain",
    "Options": "options",
    "compress_": "compress.svd",
    "explain": "explain",
}

__all__ = ["Explanation", "Options", "compress_", "explain"]

# In a source tree kernels/ and lowering/ stand beside this package; an installed wheel has them
# inside it. Only a tree that has both is taken for a source tree.
_root = Path(__file__).resolve().parent.parent
if (_root / "kernels").is_dir() and (_root / "lowering").is_dir():
    __path__.append(str(_root))


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
