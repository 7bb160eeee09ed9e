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
from numpy.typing import ArrayLike, NDArray

RECALL_TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

Series = Mapping[str, tuple[ArrayLike, ArrayLike]]


def line_chart(series: Series, xlabel: str, ylabel: str, title: str) -> bytes:
    """Lines; series: name → (x, y)."""
    figure, (axes,) = _figure(1)
    _draw_lines(axes, series)
    return _finished(figure, axes, xlabel, ylabel, title, len(series))


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


def _figure(num_axes: int, width: float = 6.4) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width * num_axes, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, num_axes, squeeze=False)[0])


def _draw_lines(axes: Axes, series: Series) -> None:
    for name, (x, y) in series.items():
        axes.plot(x, y, label=name, linewidth=1.6)


def _finished(figure: Figure, axes: Axes, xlabel: str, ylabel: str, title: str, num_series: int) -> bytes:
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if num_series > 1:
        axes.legend(frameon=False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
