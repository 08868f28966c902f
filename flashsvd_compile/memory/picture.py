"""The picture of what graphs hold: bytes over their operators, untouched above, rewritten below."""

import io
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Any

from flashsvd_compile.figure import new_figure
from flashsvd_compile.memory.timeline import Step, Timelines, most_total

_COLOURS = {
    "attention": "tab:orange",
    "feed_forward": "tab:green",
    "chain": "tab:purple",
    "siblings": "tab:olive",
}


def figure_of(graphs: Sequence[Timelines]) -> Any:
    """A matplotlib Figure of ``graphs`` one behind the other, cut by a line.

    Raises ImportError where there is no matplotlib.
    """
    figure = new_figure(12, 7)
    above, below = figure.subplots(2, sharey=True)
    _panel(above, "untouched", [graph.before for graph in graphs])
    _panel(below, "rewritten", [graph.after for graph in graphs])
    most = max((most_total(s) for g in graphs for s in (g.before, g.after)), default=0) / 2**20
    below.set_ylim(0, 1.15 * most or 1)  # the names of the peaks stand above them
    below.set_xlabel("operators that write memory, in order")
    named = {**_labels(below), **_labels(above)}
    figure.legend(named.values(), named.keys(), loc="upper right")
    figure.subplots_adjust(left=0.06, right=0.86, top=0.95, bottom=0.07)
    return figure


def png_of(graphs: Sequence[Timelines]) -> bytes:
    """The picture as a PNG. Raises ImportError where there is no matplotlib."""
    figure, written = figure_of(graphs), io.BytesIO()
    figure.savefig(written, format="png")
    return written.getvalue()


def _panel(axes: Any, title: str, graphs: Sequence[Sequence[Step]]) -> None:
    steps = [step for graph in graphs for step in graph]
    transient = [step.transient_bytes / 2**20 for step in steps]
    total = [(step.transient_bytes + step.returned_bytes) / 2**20 for step in steps]
    _mark_sites(axes, steps)
    if steps:
        axes.stairs(transient, fill=True, color="tab:blue", alpha=0.6, label="transient")
        axes.stairs(
            total, baseline=transient, fill=True, color="tab:grey", alpha=0.6, label="returned"
        )
        _mark_peak(axes, steps, transient)
    for end in accumulate(len(graph) for graph in graphs[:-1]):
        axes.axvline(end, color="black", linewidth=1, linestyle="--")
    axes.set_xlim(0, max(1, len(steps)))
    axes.set_ylabel("MiB held")
    axes.set_title(title, loc="left")


def _labels(axes: Any) -> dict[str, Any]:
    """What a legend shows, by its name."""
    handles, names = axes.get_legend_handles_labels()
    return dict(zip(names, handles, strict=True))


def _mark_sites(axes: Any, steps: Sequence[Step]) -> None:
    """A band behind each stretch of steps that belong to sites of one kind."""
    bands: dict[str, list[tuple[int, int]]] = {}
    start = 0
    for kind, run in groupby(steps, lambda step: step.site):
        length = len(list(run))
        if kind is not None:
            bands.setdefault(kind, []).append((start, length))
        start += length
    for kind, spans in bands.items():
        axes.broken_barh(
            spans, (0, 1), transform=axes.get_xaxis_transform(), color=_COLOURS[kind], alpha=0.2,
            linewidth=0, label=kind,
        )  # fmt: skip


def _mark_peak(axes: Any, steps: Sequence[Step], transient: Sequence[float]) -> None:
    index = max(range(len(steps)), key=transient.__getitem__)
    is_right = index > len(steps) / 2
    axes.annotate(
        f"{transient[index]:.2f} MiB transient at {steps[index].node}",
        (index + 0.5, transient[index]),
        xytext=(-8 if is_right else 8, 6),
        textcoords="offset points",
        horizontalalignment="right" if is_right else "left",
        arrowprops={"arrowstyle": "-"},
    )
