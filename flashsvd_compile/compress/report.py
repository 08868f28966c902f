"""What `compress_` did to each linear layer: a table to read, a dict to store."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from tabulate import tabulate

Kind = Literal["per_head", "matrix", "dense"]


@dataclass(frozen=True)
class CompressRow:
    """One linear layer. Bytes are those of its weight or factors, without the bias.

    ``error`` is ‖W − V U‖ / ‖W‖ in the Frobenius norm, of the factors as they are stored.
    ``reason`` says why the layer stayed dense; empty for others.
    """

    path: str
    kind: Kind
    rank: int | None
    bytes_before: int
    bytes_after: int
    error: float
    reason: str = ""


@dataclass(frozen=True)
class CompressReport:
    """All linear layers in the model's order, and the bytes of all parameters of the model."""

    keep: float
    rows: tuple[CompressRow, ...]
    model_bytes_before: int
    model_bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        return asdict(self) | {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        headers = ("linear", "kind", "rank", "KiB before", "KiB after", "error", "reason")
        table = [
            (
                row.path,
                row.kind,
                row.rank,
                row.bytes_before / 2**10,
                row.bytes_after / 2**10,
                row.error,
                row.reason,
            )
            for row in self.rows
        ]
        body = tabulate(table, headers, floatfmt=("", "", "", ".1f", ".1f", ".3f", ""))
        factored = sum(row.kind != "dense" for row in self.rows)
        return (
            f"{body}\n{factored} of {len(self.rows)} linear layers factored at keep={self.keep}; "
            f"all parameters: {self.model_bytes_before / 2**20:.1f} MiB before, "
            f"{self.model_bytes_after / 2**20:.1f} MiB after"
        )
