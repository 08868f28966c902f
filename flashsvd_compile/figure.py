"""An empty figure to draw into, where matplotlib is installed.

The state that pyplot shares over a process is not touched.
"""

from typing import Any

NEEDS_MATPLOTLIB = 'the picture needs matplotlib: pip install "flashsvd_compile[plot]"'


def new_figure(width: float, height: float) -> Any:
    """A matplotlib Figure, in inches. Raises ImportError where there is no matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(NEEDS_MATPLOTLIB) from error
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure
