"""``explain``: what the backend would do to a model; nothing is compiled unless to measure it."""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._dynamo
from torch import fx, nn

from flashsvd_compile.analysis.calls import is_tensor, value
from flashsvd_compile.factoring.records import Factoring, tables
from flashsvd_compile.measurement import Measurement, measure_calls
from flashsvd_compile.memory.peak import Peak
from flashsvd_compile.memory.picture import figure_of
from flashsvd_compile.memory.timeline import Timelines
from flashsvd_compile.options import Options
from flashsvd_compile.pipeline import Rewritten, rewrite
from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.named_devices import device_named, own_device
from flashsvd_compile.report import (
    SiteReport,
    site_reports,
    site_table,
    summary,
    time_of_passes,
)
from flashsvd_compile.totals import Totals, totals_of


@dataclass(frozen=True)
class GraphPair:
    """The code of one traced graph, normalised and then rewritten."""

    before: str
    after: str


@dataclass(frozen=True)
class Explanation:
    """Every site of every graph that the model was traced into.

    ``sites``: see :class:`SiteReport`; near-misses have ``lowering`` None. ``graphs``: the code
    before and after, one pair for each graph. ``peaks``: what each graph will hold at most, as
    predicted for inference under Inductor; ``memory``: all that each holds on the way, untouched
    and rewritten. ``totals``: of all of it, beside what was measured. ``device``: the one that was
    asked for, None where the tensors' own counted. ``factoring``: what became of the dense weights
    of each graph; empty where options do not ask for that. ``str()`` is the tables.
    """

    sites: tuple[SiteReport, ...]
    graphs: tuple[GraphPair, ...]
    seconds: tuple[Mapping[str, float], ...]
    peaks: tuple[Peak, ...]
    memory: tuple[Timelines, ...]
    totals: Totals
    device: str | None = None
    factoring: tuple[Factoring, ...] = ()

    def __str__(self) -> str:
        graphs = f"{len(self.graphs)} graph{'s' * (len(self.graphs) != 1)}"
        passes: dict[str, float] = {}
        for laps in self.seconds:
            for name, spent in laps.items():
                passes[name] = passes.get(name, 0.0) + spent
        planned = "" if self.device is None else f"planned for {self.device}: "
        return (
            f"{planned}{summary(self.sites)} in {graphs}; {time_of_passes(passes)}\n\n"
            f"{site_table(self.sites)}\n\n{self.totals}"
            + "".join(f"\n\nholds at most {peak}" for peak in self.peaks)
            + (f"\n\n{tables(self.factoring)}" if self.factoring else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-ready values."""
        return {
            "sites": [site.to_dict() for site in self.sites],
            "graphs": [{"before": g.before, "after": g.after} for g in self.graphs],
            "seconds": [dict(laps) for laps in self.seconds],
            "peaks": [peak.to_dict() for peak in self.peaks],
            "memory": [timelines.to_dict() for timelines in self.memory],
            "totals": self.totals.to_dict(),
            "device": self.device,
            "factoring": [factoring.to_dict() for factoring in self.factoring],
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write the picture of ``memory``, as a PNG or what the ending of ``path`` says.

        Raises ImportError where there is no matplotlib.
        """
        figure_of(self.memory).savefig(path)


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | Options | None = None,
    device: str | torch.device | None = None,
    measure: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Trace ``model(*args, **kwargs)`` and tell what the backend would do with each site.

    The model runs once, eagerly and as it is; nothing is compiled. ``options`` are those of the
    backend; nothing is measured, but what was measured before counts. A compiled model is
    explained as the model inside it, at the sizes given. What has been compiled of it stays, and
    what will be compiled does not change.

    ``measure``: compile the model, too, tiles timed where ``options`` say so, and call it and the
    model as it is some ten times each: ``totals`` then have bytes and milliseconds of both.

    ``device``: what to plan for in place of the tensors' own devices, which may be ``meta``: a GPU
    by its name (``"h100"``, ``"a10"``, ``"rtx4090"``, ...) that need not be there, ``"cpu"``, or
    one of this machine. Cast the model to the dtype that it will have there.

    Raises OptionsError for bad options, ValueError for a device that is not known or on which
    ``measure`` cannot run the model, and whatever the model or a pass raises.
    """
    parsed = Options.parse(options)
    planned_for = None if device is None else device_named(device)
    call = partial(_inner(model), *args, **kwargs)
    found = _traced(call, parsed, planned_for)
    measured = None
    if measure:
        measured = _measured(call, parsed, _own_device(found, device))
        found = _traced(call, parsed, planned_for)  # tiles may have been timed
    return Explanation(
        tuple(site for r in found for site in site_reports(r)),
        tuple(GraphPair(r.before, r.after) for r in found),
        tuple(r.seconds for r in found),
        tuple(r.peak for r in found),
        tuple(r.timelines for r in found),
        totals_of(found, measured),
        None if planned_for is None else planned_for.name,
        tuple(r.factoring for r in found if r.factoring is not None),
    )


def _traced(call: partial[Any], options: Options, device: Device | None) -> list[Rewritten]:
    """What the passes make of each graph of ``call``."""
    found: list[Rewritten] = []
    errors: list[Exception] = []

    def collect(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            found.append(rewrite(gm, example_inputs, options, device=device, walk_untouched=True))
        except Exception as error:  # Dynamo would wrap it, or suppress it
            errors.append(error)
        return gm.forward

    with _apart_from_other_compiles() as apart:
        torch.compile(call.func, backend=collect, **apart)(*call.args, **call.keywords)
    if errors:
        raise errors[0]
    return found


def _measured(call: partial[Any], options: Options, device: torch.device) -> Measurement:
    with _apart_from_other_compiles() as apart:
        given: dict[str, Any] = {"backend": "flashsvd", "options": options, **apart}
        compiled = torch.compile(call.func, **given)
        return measure_calls(call, partial(compiled, *call.args, **call.keywords), device)


def _own_device(graphs: Sequence[Rewritten], asked: str | torch.device | None) -> torch.device:
    """Where the tensors of the graphs are.

    Raises ValueError where nothing can run there, or something else was ``asked`` for.
    """
    tensors = [node for r in graphs for node in r.module.graph.nodes if is_tensor(node)]
    devices = {value(node).device for node in tensors}
    if torch.device("meta") in devices:
        raise ValueError("measure=True runs the model, and its tensors on meta hold no values")
    own = max(devices or {torch.device("cpu")}, key=lambda device: device.type == "cuda")
    if asked is None:
        return own
    wanted = own_device(asked)
    if wanted is None or wanted.type != own.type or wanted.index not in (None, own.index):
        raise ValueError(
            f"measure=True runs the model on {own}, where its tensors are, which is not "
            f"device={str(asked)!r}: leave one of the two out"
        )
    return own


def _inner(model: Callable[..., Any]) -> Callable[..., Any]:
    """What was given to ``torch.compile``, whether by function, decorator or ``Module.compile``."""
    inner = getattr(model, "_orig_mod", getattr(model, "_torchdynamo_orig_callable", model))
    if isinstance(inner, nn.Module) and inner._compiled_call_impl is not None:
        return inner._call_impl
    return inner


@contextmanager
def _apart_from_other_compiles() -> Iterator[dict[str, Any]]:
    """Arguments of ``torch.compile`` and a setting under which no one sees that it has run.

    Dynamo counts compiled entries by code object, and remembers sizes for automatic dynamic
    shapes: neither may reach the model's own compiles. Torch 2.11 knows no separate count; there
    an explanation takes one of the ``recompile_limit`` entries of the model's code.
    """
    isolated = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    settings: dict[str, Any] = {
        "automatic_dynamic_shapes": False,
        "recompile_limit": sys.maxsize,
        "accumulated_recompile_limit": sys.maxsize,
    }
    with torch._dynamo.config.patch(settings):
        yield {"isolate_recompiles": True} if isolated else {}
