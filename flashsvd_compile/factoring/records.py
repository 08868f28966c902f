"""What was factored in one graph, and what was not: rows, totals, as a table and as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tabulate import tabulate

from flashsvd_compile.reason import Reason

Kind = Literal["per_head", "matrix", "dense"]


@dataclass(frozen=True)
class WeightReport:
    """One weight that the graph multiplies activations with.

    ``weight``: its path in the model. ``heads``: how many slices of it are factored on their own,
    each with ``rank``; 1 for a whole matrix. ``products``: how many products read it.
    ``dense_bytes`` of the weight itself, which stays alive, and ``factor_bytes`` beside it, 0 where
    it was left dense. ``error``: ‖W − V U‖ / ‖W‖ in the Frobenius norm, as the singular values that
    were cut off tell it; None where it was left dense. ``reason``: why it was left dense.
    """

    weight: str
    kind: Kind
    heads: int
    rank: int | None
    products: int
    dense_bytes: int
    factor_bytes: int = 0
    error: float | None = None
    reason: Reason | None = None

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"reason": None if self.reason is None else self.reason.to_dict()}


@dataclass(frozen=True)
class Factoring:
    """The weights of one graph, in the order of their first products.

    ``share``: of each factored matrix's parameters, the largest that its factors may have.
    ``refused``: why nothing was factored at all; there are no rows then.
    """

    share: float | None
    rows: tuple[WeightReport, ...] = ()
    refused: Reason | None = None

    @property
    def factored(self) -> tuple[WeightReport, ...]:
        return tuple(row for row in self.rows if row.kind != "dense")

    @property
    def dense_bytes(self) -> int:
        """Of the weights that were factored: what `compress_` would have set free."""
        return sum(row.dense_bytes for row in self.factored)

    @property
    def factor_bytes(self) -> int:
        return sum(row.factor_bytes for row in self.rows)

    def summary(self) -> str:
        """One line: what was factored, what it costs and what `compress_` would have saved."""
        if self.refused is not None:
            return f"no weight factored: {self.refused}"
        if not self.factored:
            return f"none of {len(self.rows)} weights factored"
        return (
            f"{len(self.factored)} of {len(self.rows)} weights factored: {_mib(self.factor_bytes)} "
            f"of factors beside {_mib(self.dense_bytes)} of dense weights, which stay alive; "
            f"compress_ would keep the factors only"
        )

    def table(self) -> str:
        """The summary, then one line a weight."""
        headers = ("weight", "kind", "heads", "rank", "KiB dense", "KiB factors", "error", "reason")
        rows = [
            (row.weight, row.kind, row.heads, row.rank, row.dense_bytes / 2**10,
             row.factor_bytes / 2**10, row.error, row.reason)
            for row in self.rows
        ]  # fmt: skip
        floats = ("", "", "", "", ".1f", ".1f", ".3f", "")
        body = f"\n{tabulate(rows, headers, floatfmt=floats)}" if rows else ""
        return f"{self.summary()}{body}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        return {
            "share": self.share,
            "refused": None if self.refused is None else self.refused.to_dict(),
            "weights": [row.to_dict() for row in self.rows],
            "dense_bytes": self.dense_bytes,
            "factor_bytes": self.factor_bytes,
        }


def tables(factorings: Sequence[Factoring]) -> str:
    """Those of all graphs, one after the other."""
    return "\n\n".join(factoring.table() for factoring in factorings)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
