"""The picture of a compression: ranks over blocks and layers, and what is lost at which rank."""

import math
import re
from collections.abc import Sequence
from typing import Any

from flashsvd_compile.compress.report import CompressRow
from flashsvd_compile.figure import new_figure

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")

# Below this share of what is lost without any rank, curves are cut off.
_LEAST = 1e-5


def figure_of(rows: Sequence[CompressRow]) -> Any:
    """A matplotlib Figure. Raises ImportError where there is no matplotlib.

    Above, a field for each layer: its rank, coloured by the share of its bytes that is left. Below,
    for layers that are called alike in every block, a curve for each block and a dot at its rank.
    """
    factored = [row for row in rows if row.curve]
    roles = list(dict.fromkeys(role_of(row.path)[0] for row in rows))
    curved = [r for r in roles if any(role_of(row.path)[0] == r for row in factored)]
    columns = min(4, max(1, len(curved)))
    lines = math.ceil(len(curved) / columns)
    blocks = sorted({role_of(row.path)[1] for row in rows})
    height = 2.5 + 0.3 * len(blocks)
    figure = new_figure(4 * columns + 2, height + 2.6 * lines)
    figure.set_layout_engine("constrained")
    grid = figure.add_gridspec(lines + 1, columns, height_ratios=[height, *[2.6] * lines])
    _ranks(figure, figure.add_subplot(grid[0, :]), rows, roles, blocks)
    for index, role in enumerate(curved):
        axes = figure.add_subplot(grid[1 + index // columns, index % columns])
        own = [row for row in factored if role_of(row.path)[0] == role]
        _curves(axes, role, own, is_left=index % columns == 0)
    return figure


def role_of(path: str) -> tuple[str, int]:
    """What a layer is in every block, and in which block it is: the first number in its path; -1
    where there is none."""
    found = _NUMBER.search(path)
    if found is None:
        return path, -1
    return f"{path[: found.start()]}*{path[found.end() :]}", int(found[0])


def _ranks(
    figure: Any, axes: Any, rows: Sequence[CompressRow], roles: list[str], blocks: list[int]
) -> None:
    shares = [[math.nan] * len(roles) for _ in blocks]
    for row in rows:
        role, block = role_of(row.path)
        x, y = roles.index(role), blocks.index(block)
        share = row.bytes_after / row.bytes_before if row.bytes_before else 1.0
        shares[y][x] = share
        axes.text(
            x, y, "dense" if row.rank is None else str(row.rank), fontsize=7,
            ha="center", va="center", color="white" if share < 0.6 else "black",
        )  # fmt: skip
    drawn = axes.imshow(shares, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    figure.colorbar(drawn, ax=axes, label="share of bytes left")
    axes.set_xticks(range(len(roles)), roles, rotation=20, ha="right", fontsize=7)
    axes.set_yticks(range(len(blocks)), ["" if block < 0 else str(block) for block in blocks])
    axes.set_ylabel("block")
    axes.set_title("ranks", loc="left")


def _curves(axes: Any, role: str, rows: Sequence[CompressRow], is_left: bool) -> None:
    from matplotlib import colormaps

    last = max(role_of(row.path)[1] for row in rows)
    for row in rows:
        colour = colormaps["viridis"](role_of(row.path)[1] / last if last > 0 else 0.0)
        ranks, lost = zip(*row.curve, strict=True)
        axes.plot(ranks, [max(_LEAST, share) for share in lost], color=colour, linewidth=1)
        at = dict(row.curve)[row.rank]  # type: ignore[index]
        axes.plot([row.rank], [max(_LEAST, at)], "o", color=colour, markersize=4)
    axes.set_yscale("log")
    axes.set_ylim(_LEAST, 1.5)
    axes.set_title(role, fontsize=7, loc="left")
    axes.set_xlabel("rank", fontsize=7)
    axes.tick_params(labelsize=7)
    if is_left:
        axes.set_ylabel("share that is lost", fontsize=7)
