"""What `compress_`, `merge_` and `retruncate_` did to layers: a table to read, a dict to store."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tabulate import tabulate

# Enough to see a curve by; a matrix has thousands of ranks.
CURVE_STEPS = 32

Kind = Literal["per_head", "matrix", "narrow", "dense"]


@dataclass(frozen=True)
class CompressRow:
    """One linear layer. Bytes are those of its weight or factors, without the bias.

    ``kind`` "narrow": one side of heads that were narrowed to the rank together with the other.
    ``error`` is ‖W − V U‖ / ‖W‖ in the Frobenius norm, of the factors as they are stored; of a
    narrow one, of the product of both sides. It may be large where inputs are few.
    ``reason`` says why the layer stayed dense; empty for others. ``loss``: what the missing ranks
    add to the loss, to second order and times two, as calibration predicts; None where the method
    does not. ``curve``: pairs of a rank and the share of it all that is lost at it, as the method
    measures it, from rank 0 on; of a narrow one, of both sides together.
    """

    path: str
    kind: Kind
    rank: int | None
    bytes_before: int
    bytes_after: int
    error: float
    reason: str = ""
    loss: float | None = None
    curve: tuple[tuple[int, float], ...] = ()


def curve_of(losses: Sequence[float], rank: int) -> tuple[tuple[int, float], ...]:
    """`CompressRow.curve` of what is lost at each rank from 0 on; ``rank`` is among its ranks."""
    most = len(losses) - 1
    ranks = {rank, *(round(most * step / CURVE_STEPS) for step in range(CURVE_STEPS + 1))}
    return tuple((at, losses[at] / losses[0] if losses[0] else 0.0) for at in sorted(ranks))


@dataclass(frozen=True)
class CompressReport:
    """All linear layers in the model's order, and the bytes of all parameters of the model.

    ``keep``: the share of the factored matrices' parameters that was asked for, or that a budget
    left.
    """

    keep: float
    rows: tuple[CompressRow, ...]
    model_bytes_before: int
    model_bytes_after: int
    method: str = "svd"

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        return asdict(self) | {"rows": [asdict(row) for row in self.rows]}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture of ranks over layers, and of what is lost at which rank, as a PNG or what
        the ending of ``path`` says. All heads of a layer have its rank.

        Raises ImportError where there is no matplotlib.
        """
        from flashsvd_compile.compress.picture import figure_of

        figure_of(self.rows).savefig(path)

    def __str__(self) -> str:
        whole = sum(row.loss or 0.0 for row in self.rows)
        headers = ("linear", "kind", "rank", "KiB before", "KiB after", "error", "of the loss",
                   "reason")  # fmt: skip
        table = [
            (
                row.path,
                row.kind,
                row.rank,
                row.bytes_before / 2**10,
                row.bytes_after / 2**10,
                row.error,
                "" if row.loss is None else f"{row.loss / whole if whole else 0:.1%}",
                row.reason,
            )
            for row in self.rows
        ]
        body = tabulate(table, headers, floatfmt=("", "", "", ".1f", ".1f", ".3f", "", ""))
        factored = sum(row.kind != "dense" for row in self.rows)
        return (
            f"{body}\n{factored} of {len(self.rows)} linear layers factored by {self.method} at "
            f"keep={self.keep:.4g}; "
            f"{_totals(self.model_bytes_before, self.model_bytes_after)}"
        )


@dataclass(frozen=True)
class MergeRow:
    """One low-rank layer. Bytes are those of its factors, and of its matrix where it was merged.

    ``error`` is ‖W − V U‖ / ‖V U‖ in the Frobenius norm: what rounding the matrix has cost.
    ``reason`` says why the layer kept its factors; empty where it was merged.
    """

    path: str
    rank: int
    bytes_before: int
    bytes_after: int
    error: float
    reason: str = ""

    @property
    def is_merged(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class MergeReport:
    """All low-rank layers in the model's order, and the bytes of all parameters of the model."""

    rows: tuple[MergeRow, ...]
    model_bytes_before: int
    model_bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        return asdict(self) | {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        headers = ("layer", "rank", "KiB before", "KiB after", "error", "reason")
        table = [
            (r.path, r.rank, r.bytes_before / 2**10, r.bytes_after / 2**10, r.error, r.reason)
            for r in self.rows
        ]
        body = tabulate(table, headers, floatfmt=("", "", ".1f", ".1f", ".1e", ""))
        merged = sum(row.is_merged for row in self.rows)
        return (
            f"{body}\n{merged} of {len(self.rows)} low-rank layers merged; "
            f"{_totals(self.model_bytes_before, self.model_bytes_after)}"
        )


@dataclass(frozen=True)
class RetruncateRow:
    """One low-rank layer. Bytes are those of its factors, without the bias.

    ``error`` is ‖V U − V' U'‖ / ‖V U‖ in the Frobenius norm; of narrowed heads, of the product of
    both sides. ``reason`` says why the layer kept its rank; empty where it was cut. ``loss``: what
    the ranks that are gone add to the loss, as in `CompressRow`; None without calibration.
    """

    path: str
    rank_before: int
    rank: int
    bytes_before: int
    bytes_after: int
    error: float
    reason: str = ""
    loss: float | None = None

    @property
    def is_cut(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class RetruncateReport:
    """All low-rank layers in the model's order, and the bytes of all parameters of the model.

    ``keep``: the share of the factors that was asked for, or that a budget left.
    """

    keep: float
    rows: tuple[RetruncateRow, ...]
    model_bytes_before: int
    model_bytes_after: int
    method: str = "svd"

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        return asdict(self) | {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        headers = ("layer", "rank before", "rank", "KiB before", "KiB after", "error", "reason")
        table = [
            (r.path, r.rank_before, r.rank, r.bytes_before / 2**10, r.bytes_after / 2**10, r.error,
             r.reason)
            for r in self.rows
        ]  # fmt: skip
        body = tabulate(table, headers, floatfmt=("", "", "", ".1f", ".1f", ".3f", ""))
        cut = sum(row.is_cut for row in self.rows)
        return (
            f"{body}\n{cut} of {len(self.rows)} low-rank layers cut by {self.method} at "
            f"keep={self.keep:.4g}; {_totals(self.model_bytes_before, self.model_bytes_after)}"
        )


def _totals(before: int, after: int) -> str:
    return f"all parameters: {before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB after"
