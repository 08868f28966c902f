"""What was found and decided in a graph: as rows, as a table, as JSON, as files."""

import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from flashsvd_compile.analysis.site_records import (
    AttentionSite,
    ChainSite,
    FeedForwardSite,
    SiblingsSite,
    Site,
)
from flashsvd_compile.pipeline import Rewritten
from flashsvd_compile.planner.plan import Plan
from flashsvd_compile.reason import Reason


@dataclass(frozen=True)
class SiteReport:
    """One site or near-miss.

    ``kind``: ``"attention"``, ``"feed_forward"``, ``"chain"`` or ``"siblings"``. ``where``: the
    module path.
    ``lowering``: its name, or None for a near-miss. ``plan``: None for a near-miss.
    """

    kind: str
    where: str
    lowering: str | None
    reason: Reason
    plan: Plan | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "where": self.where,
            "lowering": self.lowering,
            "reason": self.reason.to_dict(),
            "plan": None if self.plan is None else _plan_dict(self.plan),
        }


def site_reports(rewritten: Rewritten) -> tuple[SiteReport, ...]:
    """Sites in graph order, then siblings, then near-misses."""
    planned = [
        SiteReport(p.site.kind, p.site.where, p.lowering, p.reason, p) for p in rewritten.plans
    ]
    skipped = [SiteReport(s.kind, s.where, None, s.reason) for s in rewritten.skips]
    return (*planned, *skipped)


def site_table(sites: Sequence[SiteReport]) -> str:
    """One line a site."""
    rows = [
        (s.kind, s.where or "-", s.lowering or "skipped", _ranks(s.plan), _tile(s.plan),
         _bytes(s.plan), s.reason)
        for s in sites
    ]  # fmt: skip
    headers = ["kind", "where", "lowering", "ranks", "tile", "full-width bytes", "reason"]
    return tabulate(rows, headers) if rows else "no sites"


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


def _ranks(plan: Plan | None) -> str:
    return "" if plan is None else ", ".join(f"{k} {v}" for k, v in ranks(plan.site).items())


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


def _tile(plan: Plan | None) -> str:
    """``64×32, table sm_90``: its first two extents, and where the choice came from."""
    if plan is None or plan.tiling is None:
        return ""
    return f"{plan.tile[0]}×{plan.tile[1]}, {plan.tiling.source}"


def _bytes(plan: Plan | None) -> str:
    if plan is None or plan.lowering == "unfused" or plan.unfused_bytes == 0:
        return ""
    return f"{plan.transient_bytes} of {plan.unfused_bytes}"


def _plan_dict(plan: Plan) -> dict[str, Any]:
    return {
        "lowering": plan.lowering,
        "ranks": ranks(plan.site),
        "tile": list(plan.tile),
        "block_rows": plan.block_rows,
        "tile_from": "" if plan.tiling is None else plan.tiling.source,
        "sram_bytes": plan.sram_bytes,
        "transient_bytes": str(plan.transient_bytes),
        "unfused_bytes": str(plan.unfused_bytes),
    }


def dump(directory: Path, rewritten: Rewritten) -> None:
    """Write the graph before and after, the sites as JSON and the report as text.

    They lie in ``directory/graph_K``, K the first that is free, also among several processes; the
    four appear together or not at all.
    """
    sites = site_reports(rewritten)
    record: dict[str, Any] = {
        "sites": [s.to_dict() for s in sites],
        "seconds": rewritten.seconds,
        "peak": rewritten.peak.to_dict(),
    }
    text = f"{summary(sites)}; {time_of_passes(rewritten.seconds)}\n\n{site_table(sites)}\n"
    text += f"\nholds at most {rewritten.peak}\n"
    if (factoring := rewritten.factoring) is not None:
        record["factoring"] = factoring.to_dict()
        text += f"\n{factoring.table()}\n"
    contents = {
        "before.py": rewritten.before,
        "after.py": rewritten.after,
        "sites.json": json.dumps(record, indent=2),
        "report.txt": text,
    }
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".graph_", dir=directory))
    for name, text in contents.items():
        (unfinished / name).write_text(text)
    unfinished.chmod(0o755)
    for index in itertools.count():
        target = directory / f"graph_{index}"
        try:
            unfinished.rename(target)
            return
        except OSError:
            if not target.exists():  # else another graph's: a directory replaces an empty one only
                raise
