"""A whole model in a few numbers: planned beside what was measured."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from flashsvd_compile.measurement import Measurement, Run
from flashsvd_compile.memory.timeline import most_total, most_transient
from flashsvd_compile.pipeline import Rewritten
from flashsvd_compile.planner.flops import flops_of_all
from flashsvd_compile.planner.plan import Plan
from flashsvd_compile.units import bytes_text, flops_text, seconds_text


@dataclass(frozen=True)
class Totals:
    """Of all graphs of a model, at the sizes that were planned for.

    ``sites``: how many have a plan, ``rewritten`` of them. ``flops``: 2 × the multiply-adds of the
    sites, each product once; ``unfused_flops`` of the same factors, also where weights were dense.
    ``seconds``: of the sites whose time was predicted or measured, ``unfused_seconds`` of the same.
    ``transient_bytes``: the most that any graph holds beyond its inputs and outputs,
    ``total_bytes`` with its outputs; as predicted for inference under Inductor. ``untouched_..``:
    of the graphs as they were. ``measured``: None where that was not asked.
    """

    sites: int
    rewritten: int
    flops: int
    unfused_flops: int
    seconds: float
    unfused_seconds: float
    transient_bytes: int
    untouched_transient_bytes: int
    total_bytes: int
    untouched_total_bytes: int
    measured: Measurement | None = None

    def __str__(self) -> str:
        rows = [
            ["sites", str(self.sites), f"{self.rewritten} rewritten"],
            [
                "FLOPs of the sites, unfused → planned",
                flops_text(self.unfused_flops),
                flops_text(self.flops),
            ],
            [
                "time of the sites, unfused → planned",
                seconds_text(self.unfused_seconds),
                seconds_text(self.seconds),
            ],
            [
                "peak of transient bytes, untouched → rewritten",
                bytes_text(self.untouched_transient_bytes),
                bytes_text(self.transient_bytes),
            ],
            [
                "the same with outputs",
                bytes_text(self.untouched_total_bytes),
                bytes_text(self.total_bytes),
            ],
        ]
        headers = ["whole model", "before", "after"]
        if self.measured is not None:
            headers += ["measured, eager", "measured, compiled"]
            rows.append(["milliseconds of a call", "", ""])
            runs = (self.measured.eager, self.measured.compiled)
            for row, *cells in zip(rows, *map(_cells, runs), strict=True):
                row += cells
        return tabulate(rows, headers, disable_numparse=True)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-ready values."""
        return asdict(self)


def totals_of(graphs: Sequence[Rewritten], measured: Measurement | None = None) -> Totals:
    """Totals of graphs that tell what they would have held untouched."""
    plans = [plan for graph in graphs for plan in graph.plans]
    flops = [
        (graph, flops_of_all([(plan, graph.found[plan.site.node]) for plan in graph.plans]))
        for graph in graphs
    ]
    times = [pair for plan in plans if (pair := _seconds(plan)) is not None]
    before = [graph.timelines.before for graph in graphs]
    after = [graph.timelines.after for graph in graphs]
    return Totals(
        sites=len(plans),
        rewritten=sum(plan.lowering != "unfused" for plan in plans),
        flops=sum(round(graph.at(of.planned)) for graph, of in flops),
        unfused_flops=sum(round(graph.at(of.unfused)) for graph, of in flops),
        seconds=sum(seconds for seconds, _ in times),
        unfused_seconds=sum(unfused for _, unfused in times),
        transient_bytes=max(map(most_transient, after), default=0),
        untouched_transient_bytes=max(map(most_transient, before), default=0),
        total_bytes=max(map(most_total, after), default=0),
        untouched_total_bytes=max(map(most_total, before), default=0),
        measured=measured,
    )


def _seconds(plan: Plan) -> tuple[float, float] | None:
    """Of the plan and of its site unfused; None where one of them is not known."""
    known = {rival.lowering: rival.seconds for rival in plan.rivals} | {plan.lowering: plan.seconds}
    now, then = known[plan.lowering], known.get("unfused")
    return None if now is None or then is None else (now, then)


def _cells(run: Run) -> list[str]:
    """What was measured of each row."""
    least = "at least " if run.peak.is_least else ""
    return [
        "",
        "",
        "",
        least + bytes_text(run.peak.transient_bytes),
        bytes_text(run.peak.total_bytes),
        f"{run.milliseconds:.3g}",
    ]
