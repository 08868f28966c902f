"""What was found and decided in a graph: as rows, as a table, as JSON, as files."""

import itertools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tabulate import tabulate

from flashsvd_compile.analysis.axes import Size
from flashsvd_compile.analysis.site_records import (
    AttentionSite,
    ChainSite,
    FeedForwardSite,
    SiblingsSite,
    Site,
)
from flashsvd_compile.memory.picture import png_of
from flashsvd_compile.pipeline import Rewritten
from flashsvd_compile.planner.cost import at
from flashsvd_compile.planner.flops import flops_of
from flashsvd_compile.planner.plan import Plan
from flashsvd_compile.reason import Reason
from flashsvd_compile.totals import totals_of
from flashsvd_compile.units import bytes_text, flops_text, seconds_text


@dataclass(frozen=True)
class SiteReport:
    """One site or near-miss.

    ``kind``: ``"attention"``, ``"feed_forward"``, ``"chain"`` or ``"siblings"``. ``where``: the
    module path.
    ``lowering``: its name, or None for a near-miss. ``plan``, ``found``: None for a near-miss; the
    latter is the site before the plan chose which of its arms to lift. ``sizes``: what was planned
    for.
    """

    kind: str
    where: str
    lowering: str | None
    reason: Reason
    plan: Plan | None = None
    found: Site | None = None
    sizes: Mapping[Size, int] = field(default_factory=dict)

    @cached_property
    def formulas(self) -> Mapping[str, Size]:
        """``flops`` (2 × multiply-adds) and ``transient_bytes`` as planned, ``unfused_flops`` and
        ``unfused_bytes`` without, in the graph's symbols; empty for a near-miss."""
        if self.plan is None or self.found is None:
            return {}
        plan, flops = self.plan, flops_of(self.plan, self.found)
        stays = plan.lowering == "unfused"
        return {
            "flops": flops.planned,
            "unfused_flops": flops.unfused,
            "transient_bytes": plan.unfused_bytes if stays else plan.transient_bytes,
            "unfused_bytes": plan.unfused_bytes,
        }

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """`formulas` at the sizes that were planned for."""
        return {name: round(at(formula, self.sizes)) for name, formula in self.formulas.items()}

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "where": self.where,
            "lowering": self.lowering,
            "reason": self.reason.to_dict(),
            "plan": None if self.plan is None else self._plan_dict(self.plan),
        }

    def _plan_dict(self, plan: Plan) -> dict[str, Any]:
        return {
            "lowering": plan.lowering,
            "ranks": ranks(plan.site),
            "tile": list(plan.tile),
            "block_rows": plan.block_rows,
            "tile_from": "" if plan.tiling is None else plan.tiling.source,
            "sram_bytes": plan.sram_bytes,
            "seconds": plan.seconds,
            "known_from": plan.known_from,
            "rivals": [
                {"lowering": r.lowering, "seconds": r.seconds, "reason": r.reason.to_dict()}
                for r in plan.rivals
            ],
            **{name: str(formula) for name, formula in self.formulas.items()},
            "at_sizes": dict(self.numbers),
        }


def site_reports(rewritten: Rewritten) -> tuple[SiteReport, ...]:
    """Sites in graph order, then siblings, then near-misses."""
    planned = [
        SiteReport(
            p.site.kind, p.site.where, p.lowering, p.reason, p,
            rewritten.found[p.site.node], rewritten.sizes,
        )
        for p in rewritten.plans
    ]  # fmt: skip
    skipped = [SiteReport(s.kind, s.where, None, s.reason) for s in rewritten.skips]
    return (*planned, *skipped)


def site_table(sites: Sequence[SiteReport]) -> str:
    """One line a site."""
    rows = [[text(site) for text in _COLUMNS.values()] for site in sites]
    return tabulate(rows, [*_COLUMNS], disable_numparse=True) if rows else "no sites"


def summary(sites: Sequence[SiteReport]) -> str:
    """``12 attention rank_space, 12 feed_forward streamed, 1 attention skipped``."""
    counts: dict[str, int] = {}
    for site in sites:
        name = f"{site.kind} {site.lowering or 'skipped'}"
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "no sites"


def time_of_passes(seconds: Mapping[str, float]) -> str:
    """``passes took 0.12 s: normalize 0.08, analysis 0.02, plan 0.01, ...``."""
    each = ", ".join(f"{name} {spent:.2f}" for name, spent in seconds.items())
    return f"passes took {sum(seconds.values()):.2f} s: {each}"


def ranks(site: Site) -> dict[str, str]:
    """The rank of each low-rank input, and ``dense`` for the others."""
    if isinstance(site, AttentionSite):
        return {name: str(arm.rank_size) if arm.factor else "dense"
                for name, arm in site.arms.items()}  # fmt: skip
    if isinstance(site, FeedForwardSite):
        arms = {"up": site.up} | ({"gate": site.gate} if site.gate else {})
        found = {name: str(arm.rank_size) for name, arm in arms.items()}
        return found | {"down": "·".join(str(atom.size) for atom in site.out)}
    if isinstance(site, SiblingsSite):
        return {f"r{index}": str(width) for index, width in enumerate(site.widths)}
    return {"r": str(site.rank)} if isinstance(site, ChainSite) else {}


def _ranks(site: SiteReport) -> str:
    if site.plan is None:
        return ""
    return ", ".join(f"{name} {rank}" for name, rank in ranks(site.plan.site).items())


def _tile(site: SiteReport) -> str:
    """``64×32, table sm_90``: its first two extents, and where the choice came from."""
    plan = site.plan
    if plan is None or plan.tiling is None:
        return ""
    return f"{plan.tile[0]}×{plan.tile[1]}, {plan.tiling.source}"


def _sram(site: SiteReport) -> str:
    return bytes_text(site.plan.sram_bytes) if site.plan and site.plan.sram_bytes else ""


def _flops(site: SiteReport) -> str:
    return _of("flops", "unfused_flops", site, flops_text)


def _full_width(site: SiteReport) -> str:
    return _of("transient_bytes", "unfused_bytes", site, bytes_text)


def _seconds(site: SiteReport) -> str:
    """``61 µs, predicted``: of one call at the sizes that were planned for."""
    if site.plan is None or site.plan.seconds is None:
        return ""
    return f"{seconds_text(site.plan.seconds)}, {site.plan.known_from}"


def _runner_up(site: SiteReport) -> str:
    """``row_blocks, 1.42 times as long, predicted``, or why there is none."""
    if site.plan is None or not site.plan.rivals:
        return ""
    first = site.plan.rivals[0]
    return f"{first.lowering}: {first.reason.observed}"


def _of(planned: str, unfused: str, site: SiteReport, text: Callable[[float], str]) -> str:
    """``96 KiB of 1.5 MiB``; one number where nothing changes, none where there is nothing."""
    now, then = site.numbers.get(planned, 0), site.numbers.get(unfused, 0)
    if not then:
        return ""
    return text(now) if now == then else f"{text(now)} of {text(then)}"


_COLUMNS: dict[str, Callable[[SiteReport], str]] = {
    "kind": lambda site: site.kind,
    "where": lambda site: site.where or "-",
    "lowering": lambda site: site.lowering or "skipped",
    "ranks": _ranks,
    "tile": _tile,
    "SRAM": _sram,
    "FLOPs, of unfused": _flops,
    "full width, of unfused": _full_width,
    "time": _seconds,
    "runner-up": _runner_up,
    "reason": lambda site: str(site.reason),
}


def dump(directory: Path, rewritten: Rewritten) -> None:
    """Write the graph before and after, the sites as JSON, the report as text, and the picture of
    what the graph holds, for which matplotlib is needed.

    They lie in ``directory/graph_K``, K the first that is free, also among several processes; they
    appear together or not at all.
    """
    sites, totals = site_reports(rewritten), totals_of([rewritten])
    record: dict[str, Any] = {
        "sites": [s.to_dict() for s in sites],
        "seconds": rewritten.seconds,
        "peak": rewritten.peak.to_dict(),
        "totals": totals.to_dict(),
        "memory": rewritten.timelines.to_dict(),
    }
    text = f"{summary(sites)}; {time_of_passes(rewritten.seconds)}\n\n{site_table(sites)}\n"
    text += f"\n{totals}\n\nholds at most {rewritten.peak}\n"
    if (factoring := rewritten.factoring) is not None:
        record["factoring"] = factoring.to_dict()
        text += f"\n{factoring.table()}\n"
    contents = {
        "before.py": rewritten.before.encode(),
        "after.py": rewritten.after.encode(),
        "sites.json": json.dumps(record, indent=2).encode(),
    }
    try:
        contents["memory.png"] = png_of([rewritten.timelines])
    except ImportError as error:
        text += f"\n{error}\n"
    contents["report.txt"] = text.encode()
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".graph_", dir=directory))
    for name, content in contents.items():
        (unfinished / name).write_bytes(content)
    unfinished.chmod(0o755)
    for index in itertools.count():
        target = directory / f"graph_{index}"
        try:
            unfinished.rename(target)
            return
        except OSError:
            if not target.exists():  # else another graph's: a directory replaces an empty one only
                raise
