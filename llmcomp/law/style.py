"""The look of the figures and what all of them share: sizes, colours, axes, names, groups of cells, baseline labels.

What may not live here: figures themselves (llmcomp.law.plot). Colour-blind safe, and in order when printed in grey:
lightness grows with the series, and every series has its own marker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from numpy.typing import ArrayLike

from llmcomp import results
from llmcomp.errors import Error
from llmcomp.law.text import short_number

RATIO_LABEL = "compressed / original size"
BARS_LABEL = "(bars: standard error)"
PARAMS_LABEL = "parameters P (total)"  # with embeddings, as the column params
STEP_LABEL = "training steps S"
PANEL_INCHES = (2.9, 2.7)  # width and height of one panel in print
STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "legend.title_fontsize": 8.0,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.88",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    # A matplotlibrc in the working directory must not have LaTeX run.
    "text.usetex": False,
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)))
P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draws under STYLE and leaves the caller's settings as they were."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def axes_of(
    given: Any, n_columns: int = 1, n_rows: int = 1, inches: tuple[float, float] = PANEL_INCHES, **kwargs: Any
) -> Any:
    """The given Axes as an array [n_rows, n_columns], or new ones of a pyplot figure (so that notebooks show it)."""
    if given is None:
        from matplotlib import pyplot

        size = (inches[0] * n_columns, inches[1] * n_rows)
        _, given = pyplot.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained", **kwargs)
    found = np.asarray(given, dtype=object)
    if found.size != n_rows * n_columns:
        raise Error(f"expected {n_rows * n_columns} Axes, found {found.size}")
    return found.reshape(n_rows, n_columns)


def new_figure(
    n_columns: int, n_rows: int = 1, inches: tuple[float, float] = PANEL_INCHES, **kwargs: Any
) -> tuple[Figure, Any]:
    """A figure outside pyplot's list, so that writing many of them keeps none open."""
    figure = Figure(figsize=(inches[0] * n_columns, inches[1] * n_rows), layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False, **kwargs)


def colours(n: int) -> list[Any]:
    return [matplotlib.colormaps["cividis"](x) for x in np.linspace(0.0, 0.8, max(n, 2))][:n]


def label_of(axis: Any) -> str:
    """What an axis of a law is called in a figure, with its letter."""
    return PARAMS_LABEL if axis.column == "params" else f"{axis.label} {axis.letter}"


def title_of(cells: pd.DataFrame) -> str:
    first = cells.iloc[0]
    dataset, modality = str(first["dataset"]), str(first["modality"])
    name = f"{modality}: {dataset}" if dataset and modality and dataset != modality else dataset or modality
    return name + (f"\n{first['protocol']} protocol" if first["protocol"] else "")


def log_axis(axis: Any, values: ArrayLike, label: str) -> None:
    """A logarithmic axis with ticks at the values themselves, thinned where labels would touch."""
    ticks: list[float] = []
    distinct = np.unique(np.asarray(values, dtype=float))
    span = math.log(distinct[-1] / distinct[0]) or 1.0
    for value in distinct[::-1]:
        if not ticks or math.log(ticks[-1] / value) > 0.13 * span:
            ticks.append(float(value))
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_label_text(label)


def legend_beside(ax: Axes, title: str) -> None:
    """Beside the panel, where no curve can run through it."""
    ax.legend(title=title, loc="center left", bbox_to_anchor=(1.0, 0.5), borderaxespad=0.3, handlelength=1.4)


def keep_last_legend(panels: Sequence[Axes]) -> None:
    """One legend for a row of panels whose series are the same."""
    legends = [ax.get_legend() for ax in panels]
    entries = [[text.get_text() for text in legend.get_texts()] if legend else [] for legend in legends]
    for legend, entry in zip(legends[:-1], entries[:-1], strict=True):
        if legend and entry == entries[-1]:
            legend.remove()


def fine_range(values: ArrayLike, n: int = 60) -> Any:
    found = np.asarray(values, dtype=float)
    return np.geomspace(found.min(), found.max(), n)


def models_and_baselines(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cells of models (params and step known, step above 0) and cells of baselines (no params)."""
    cells = results.cells(table)
    is_model = cells["params"].notna() & (cells["step"].fillna(0) > 0) & (cells["unit"] == "chunk")
    return cells[is_model], cells[cells["params"].isna()]


def modality_rank(cells: pd.DataFrame) -> int:
    """Text, image, speech, others: the order of the panels."""
    return {"text": 0, "image": 1, "speech": 2}.get(str(cells["modality"].iloc[0]), 3)


def groups_of(table: pd.DataFrame) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """(model cells, baseline cells of the same data set) for every data set, protocol and mapping; text first."""
    models, baselines = models_and_baselines(table)
    if models.empty:
        raise Error("nothing to draw: no cell has both params and a step above 0")
    groups = [group for _, group in models.groupby(["dataset", "modality", "protocol", "mapping"], sort=True)]
    groups.sort(key=modality_rank)
    return [(group, baselines[baselines["dataset"] == group["dataset"].iloc[0]]) for group in groups]


def last_step(cells: pd.DataFrame) -> pd.DataFrame:
    return cells[cells["step"] == cells["step"].max()].sort_values("params")


def series_of(cells: pd.DataFrame, by: str) -> Iterator[tuple[float, pd.DataFrame, Any, str]]:
    """(value, its cells, colour, marker) for every value of params or step, ascending."""
    values = sorted(cells[by].unique())
    shades = colours(len(values))
    others = [name for name in ("params", "step") if name in cells.columns and name != by]
    for i, value in enumerate(values):
        part = cells[cells[by] == value]
        yield float(value), part.sort_values(others) if others else part, shades[i], MARKERS[i % len(MARKERS)]


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Ascending values moved apart to at least `gap`, each cluster kept about its own mean."""
    clusters: list[list[float]] = []
    for value in values:
        clusters.append([value])
        while len(clusters) > 1:
            below, above = clusters[-2:]
            top = sum(below) / len(below) + 0.5 * gap * (len(below) - 1)
            bottom = sum(above) / len(above) - 0.5 * gap * (len(above) - 1)
            if bottom - top >= gap:
                break
            clusters[-2:] = [below + above]
    return [sum(c) / len(c) + gap * (i - 0.5 * (len(c) - 1)) for c in clusters for i in range(len(c))]


def baseline_name(cell: pd.Series) -> str:
    return f"{cell['model']}{' (stream)' if cell['unit'] == 'stream' else ''}"


def draw_baselines(ax: Axes, baselines: pd.DataFrame) -> None:
    """Horizontal lines, named beside the panel; names that would touch are moved apart and tied to their lines."""
    found = baselines.sort_values("ratio").reset_index(drop=True)
    low, high = ax.get_ylim()
    heights = spread(found["ratio"].tolist(), 0.068 * (high - low))
    for i, (height, (_, row)) in enumerate(zip(heights, found.iterrows(), strict=True)):
        ratio = float(row["ratio"])
        ax.axhline(ratio, color="0.35", linewidth=0.9, linestyle=LINES[i % len(LINES)], zorder=1)
        name = f"{baseline_name(row)} {ratio:.3f}"
        where = ax.get_yaxis_transform()
        ax.plot([1.0, 1.04], [ratio, height], color="0.5", linewidth=0.6, transform=where, clip_on=False)
        ax.text(1.05, height, name, transform=where, va="center", fontsize=7.5)
