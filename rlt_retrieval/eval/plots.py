"""Plots of an evaluation as PNG bytes. Imported only where one is drawn: a metric must not need a plotting library.

Figures are made without pyplot, so that no global state changes; the same numbers give the same bytes.
"""

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from matplotlib.transforms import Bbox
from numpy.typing import ArrayLike, NDArray

RECALL_TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
# Typographic points above (below) a point where its name may stand, the nearest first.
NAME_OFFSETS = tuple(sign * height for height in range(10, 150, 12) for sign in (1, -1))

Series = Mapping[str, tuple[ArrayLike, ArrayLike]]


def line_chart(series: Series, xlabel: str, ylabel: str, title: str) -> bytes:
    """Lines; series: name → (x, y)."""
    figure, (axes,) = _figure(1)
    _draw_lines(axes, series)
    return _finished(figure, axes, xlabel, ylabel, title, len(series))


def scatter_charts(
    panels: Sequence[tuple[str, Mapping[str, tuple[float, float]]]], xlabel: str, ylabel: str
) -> bytes:
    """Single points with their names beside them, panels side by side; panels: title and name → (x, y), x above 0.

    The x axes are logarithmic.
    """
    figure, axes_of = _figure(len(panels), height=4.4)
    for axes, (title, points) in zip(axes_of, panels, strict=True):
        for x, y in points.values():
            axes.plot([x], [y], marker="o", markersize=6)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(LogFormatter())
        axes.xaxis.set_minor_formatter(LogFormatter())  # labels these too where there are few others
        axes.margins(0.1, 0.2)
        _dress(axes, xlabel, ylabel, title)
    figure.draw_without_rendering()  # settles where the axes lie, and so the points
    for axes, (_, points) in zip(axes_of, panels, strict=True):
        _name_points(axes, points)
    return _png(figure)


def _name_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Each name above or below its point, as near as it covers no other name and no point; a line leads there."""
    pixels_a_point = axes.figure.dpi / 72
    places = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in places.values()]
    for name, (x, y) in sorted(places.items(), key=lambda item: tuple(item[1])):
        note = axes.annotate(
            name,
            points[name],
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize="small",
        )
        size = note.get_window_extent()
        for offset in NAME_OFFSETS:
            middle = y + offset * pixels_a_point
            box = Bbox.from_bounds(x - size.width / 2, middle - size.height / 2, size.width, size.height)
            if not box.count_overlaps(taken):
                break
        taken.append(box)
        note.set_position((0, offset))
        if abs(offset) > abs(NAME_OFFSETS[0]):
            axes.annotate(
                "",
                points[name],
                (0, offset),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "alpha": 0.3, "shrinkA": 6, "shrinkB": 3},
            )


def recall_curves(series: Series) -> bytes:
    """Recall at k over k, on a logarithmic axis; series: name → (k, recall)."""
    figure, (axes,) = _figure(1)
    _draw_lines(axes, series)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    largest_k = max(np.max(ks) for ks, _ in series.values())
    axes.set_xticks([k for k in RECALL_TICKS if k <= largest_k])
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:.0f}")
    return _finished(figure, axes, "k", "queries with a right item in the first k", "Recall", len(series))


def histogram(
    values: Mapping[str, NDArray[np.float64]], xlabel: str, ylabel: str, title: str, num_bins: int = 20
) -> bytes:
    """Shares of values in [0, 1], one outline a name: directions with unequal numbers of queries can be compared."""
    figure, (axes,) = _figure(1)
    edges = np.linspace(0, 1, num_bins + 1)
    for (name, numbers), style in zip(values.items(), itertools.cycle(("-", "--")), strict=False):
        counts, _ = np.histogram(numbers, edges)
        axes.stairs(counts / max(1, len(numbers)), edges, label=name, linewidth=1.6, linestyle=style)
    axes.set_xlim(0, 1)
    return _finished(figure, axes, xlabel, ylabel, title, len(values))


def heat_maps(maps: Mapping[str, NDArray[Any]], xlabel: str, ylabel: str) -> bytes:
    """Matrices of one shape side by side, each with its own colour scale."""
    figure, axes_of = _figure(len(maps), width=4.6)
    for axes, (title, values) in zip(axes_of, maps.items(), strict=True):
        image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis")
        figure.colorbar(image, ax=axes, shrink=0.9)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    return _png(figure)


def _figure(num_axes: int, width: float = 6.4, height: float = 3.6) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width * num_axes, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, num_axes, squeeze=False)[0])


def _draw_lines(axes: Axes, series: Series) -> None:
    for name, (x, y) in series.items():
        axes.plot(x, y, label=name, linewidth=1.6)


def _finished(figure: Figure, axes: Axes, xlabel: str, ylabel: str, title: str, num_series: int) -> bytes:
    _dress(axes, xlabel, ylabel, title)
    if num_series > 1:
        axes.legend(frameon=False)
    return _png(figure)


def _dress(axes: Axes, xlabel: str, ylabel: str, title: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
