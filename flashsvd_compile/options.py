"""What a user may ask of the backend: parsed once, checked, and frozen."""

import difflib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

COMPILERS = ("inductor", "aot_eager", "eager")
ATTENTION_LOWERINGS = ("auto", "rank_space", "unfused")
FEED_FORWARD_LOWERINGS = ("auto", "streamed", "streamed_whole", "row_blocks", "unfused")
CHAIN_LOWERINGS = ("auto", "streamed", "unfused")
SIBLINGS_LOWERINGS = ("auto", "merged", "unfused")
AUTOTUNE = ("auto", True, False)
_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
          "KB": 10**3, "MB": 10**6, "GB": 10**9}  # fmt: skip


class OptionsError(RuntimeError):
    """An option that does not exist or a value that it does not take."""


@dataclass(frozen=True)
class Options:
    """Options of ``torch.compile(model, backend="flashsvd", options={...})``.

    ``compiler``: what compiles the rewritten graph: ``"inductor"``, ``"aot_eager"`` (autograd
    tracing only) or ``"eager"`` (the graph as it is; for tests and debugging).
    ``attention``, ``feed_forward``, ``chain``: ``"auto"`` lets the planner choose; a name forces
    that lowering wherever it is legal. ``siblings``: the same for down-projections that read the
    same activations; ``"merged"`` is one launch for all of them.
    ``sram_budget``: bytes of shared memory that one block may use, as a number or ``"99KiB"``;
    the device's own limit by default.
    ``memory_budget``: bytes of transient activations that one forward may hold beyond its inputs
    and outputs, as a number or ``"96MiB"``; inference only. Where no choice of lowerings keeps it,
    compiling raises BudgetError. ``max_batch`` and ``max_length``: the largest first and second
    size of dynamic inputs that the budget has to hold for; beyond them, or beyond the first call's
    where they are not given, another graph is planned.
    ``autotune``: what is timed while a model is compiled, and the fastest kept on disk
    (`cache_directory`). ``True``: for each kind of site the lowerings that are predicted to be near
    the fastest, compiled (inference only; tens of seconds), and on a GPU for each kind of call a
    few tiles. ``"auto"``: all of it under Inductor's ``max_autotune``, which
    ``mode="max-autotune"`` sets, else only tiles, where the GPU's generation has no table of them.
    ``False``: nothing, and nothing kept is read; nor are the device's own rates measured (once, a
    fraction of a second), those of its kind count.
    ``keep``, ``weight_budget``: factor the dense weights of a model in inference while compiling
    it, to this share of each one's parameters, in (0, 1), or so that those of one graph fit into
    this many bytes, a number or ``"200MiB"``; at most one of the two. None factors nothing.
    ``debug_dir``: a directory that gets every graph before and after, the sites as JSON, the report
    as text, and a picture of what the graph holds before and after, if matplotlib is there.
    ``inductor``: every other option is Inductor's own and is passed through. As in torch, a dash
    in a name is an underscore.
    """

    compiler: str = "inductor"
    attention: str = "auto"
    feed_forward: str = "auto"
    chain: str = "auto"
    siblings: str = "auto"
    sram_budget: int | None = None
    memory_budget: int | None = None
    max_batch: int | None = None
    max_length: int | None = None
    autotune: bool | str = "auto"
    keep: float | None = None
    weight_budget: int | None = None
    debug_dir: Path | None = None
    inductor: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def factors_weights(self) -> bool:
        """Whether dense weights are to be factored."""
        return self.keep is not None or self.weight_budget is not None

    def times_tiles(self, is_measured: bool) -> bool:
        """Whether tiles are timed in place of an order that is, or is not, one of measurements."""
        if self.autotune == "auto":
            return not is_measured or bool(self.inductor.get("max_autotune"))
        return bool(self.autotune)

    @property
    def times_lowerings(self) -> bool:
        """Whether lowerings are timed in place of a prediction, which no device is without."""
        return self.times_tiles(is_measured=True)

    def forcing(self, kind: str, lowering: str) -> "Options":
        """The same, with ``lowering`` for all sites of ``kind``."""
        given: dict[str, Any] = {kind: lowering}
        return replace(self, **given)

    @classmethod
    def parse(
        cls, options: "Mapping[str, Any] | Options | None" = None, mode: str | None = None
    ) -> "Options":
        """Options from what ``torch.compile`` was given.

        Raises OptionsError for a name that neither this backend nor Inductor knows, for a value
        that an option does not take, for two options that exclude each other and for an unknown
        mode; the message names the nearest right spelling.
        """
        if isinstance(options, Options):
            return options
        given = {name.replace("-", "_"): value for name, value in (options or {}).items()}
        own = {f.name for f in fields(cls)} - {"inductor"}
        known = {name: _VALIDATE[name](name, given.pop(name)) for name in sorted(own & set(given))}
        if known.get("keep") is not None and known.get("weight_budget") is not None:
            raise OptionsError("keep and weight_budget both say how large factors are: give one")
        patches = _mode_patches(mode) | _inductor_patches(given, own)
        return cls(**known, inductor=MappingProxyType(patches))


def _mode_patches(mode: str | None) -> dict[str, Any]:
    if mode is None:
        return {}
    from torch._inductor import list_mode_options

    modes = list_mode_options()
    if mode not in modes and mode != "default":
        raise OptionsError(_unknown("mode", mode, [*modes, "default"]))
    return dict(modes.get(mode, {}))


def _inductor_patches(given: dict[str, Any], own: set[str]) -> dict[str, Any]:
    if not given:
        return {}
    from torch._inductor import list_options

    known = list_options()
    for name in given:
        if name not in known:
            raise OptionsError(_unknown("option", name, [*sorted(own), *sorted(known)]))
    try:
        return torch._TorchCompileInductorWrapper(None, given, None).config
    except RuntimeError as error:  # a value of the wrong type
        raise OptionsError(str(error)) from error


def _unknown(what: str, name: object, allowed: list[str]) -> str:
    nearest = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0)
    listed = ", ".join(allowed) if len(allowed) <= 12 else "this backend's own and Inductor's"
    return f"unknown {what} {name!r}; the nearest is {nearest[0]!r} (allowed: {listed})"


def _one_of(allowed: tuple[str | bool, ...]) -> Any:
    def validate(name: str, value: Any) -> Any:
        if not any(value is one or (isinstance(one, str) and value == one) for one in allowed):
            raise OptionsError(_unknown(f"value of {name}", value, [str(one) for one in allowed]))
        return value

    return validate


def parse_bytes(name: str, value: Any) -> int | None:
    """``101376``, ``"99KiB"`` or ``"1.5 MiB"`` as bytes; None stays None.

    Raises OptionsError for anything else, for a unit that does not exist, and for less than one.
    """
    if value is None:
        return None
    number, unit = value, ""
    if isinstance(value, str):
        digits = value.strip()
        unit = digits.lstrip("0123456789.").strip()
        number = digits[: len(digits) - len(unit)].strip() if unit else digits
        if unit.upper() not in _UNITS:
            nearest = difflib.get_close_matches(unit.upper(), [*_UNITS][1:], n=1, cutoff=0)[0]
            raise OptionsError(f"{name}={value!r}: no unit {unit!r}; the nearest is {nearest!r}")
    try:
        size = int(float(number) * _UNITS[unit.upper()])
    except (TypeError, ValueError) as error:
        raise OptionsError(f'{name}={value!r} is no size: a number of bytes or "99KiB"') from error
    if isinstance(value, bool) or size <= 0:
        raise OptionsError(f"{name}={value!r}: at least one byte is needed")
    return size


def _share(name: str, value: Any) -> float | None:
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < 1:
        raise OptionsError(f"{name}={value!r}: a share of parameters between 0 and 1 is needed")
    return float(value)


def cache_directory() -> Path:
    """Where what was measured is kept: ``FLASHSVD_CACHE_DIR``; else ``flashsvd`` in
    ``TORCHINDUCTOR_CACHE_DIR``; else ``flashsvd_compile`` in the user's directory of caches."""
    if given := os.environ.get("FLASHSVD_CACHE_DIR"):
        return Path(given)
    if given := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(given) / "flashsvd"
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # nobody's home
        caches = Path(tempfile.gettempdir())
    return caches / "flashsvd_compile"


def _count(name: str, value: Any) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise OptionsError(f"{name}={value!r}: a whole number of at least 1 is needed")


def _directory(name: str, value: Any) -> Path | None:
    if value is None or isinstance(value, (str, Path)):
        return None if value is None else Path(value)
    raise OptionsError(f"{name}={value!r}: a path is needed")


_VALIDATE: dict[str, Any] = {
    "compiler": _one_of(COMPILERS),
    "attention": _one_of(ATTENTION_LOWERINGS),
    "feed_forward": _one_of(FEED_FORWARD_LOWERINGS),
    "chain": _one_of(CHAIN_LOWERINGS),
    "siblings": _one_of(SIBLINGS_LOWERINGS),
    "sram_budget": parse_bytes,
    "memory_budget": parse_bytes,
    "max_batch": _count,
    "max_length": _count,
    "autotune": _one_of(AUTOTUNE),
    "keep": _share,
    "weight_budget": parse_bytes,
    "debug_dir": _directory,
}
