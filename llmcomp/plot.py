"""Rows and laws -> matplotlib Axes: every function draws on the Axes it is given, or on new ones, and returns them.

What may not live here: fitting, scoring, reading files. A law is anything with `cells`, `predict` and `band`
(llmcomp.fit.ScalingLaw); several laws are a mapping of them. Figures are colour-blind safe and keep their order in grey
(lightness grows with the series, and every series has its own marker).
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from mpl_toolkits.mplot3d.axes3d import Axes3D
from numpy.typing import ArrayLike

from llmcomp import results
from llmcomp.errors import Error

RATIO_LABEL = "compressed / original size"
PARAMS_LABEL = "parameters P"
STEP_LABEL = "training steps S"
PANEL_INCHES = (2.9, 2.7)  # width and height of one panel in print
STYLE: Mapping[str, Any] = {
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
}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)))

P = ParamSpec("P")
R = TypeVar("R")


def _styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draws under STYLE and leaves the caller's settings as they were."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(dict(STYLE)):
            return draw(*args, **kwargs)

    return drawn


def _axes(
    given: Any, n_columns: int = 1, n_rows: int = 1, inches: tuple[float, float] = PANEL_INCHES, **kwargs: Any
) -> Any:
    """The given Axes as an array [n_rows, n_columns], or new ones of a new pyplot figure (so that notebooks show it)."""
    if given is None:
        from matplotlib import pyplot

        size = (inches[0] * n_columns, inches[1] * n_rows)
        _, given = pyplot.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained", **kwargs)
    found = np.asarray(given, dtype=object)
    if found.size != n_rows * n_columns:
        raise Error(f"expected {n_rows * n_columns} Axes, found {found.size}")
    return found.reshape(n_rows, n_columns)


# ---- names, scales, colours ----


def _short(value: float) -> str:
    """1400000000 -> 1.4B, 13000 -> 13k, 2048 -> 2,048."""
    if 1e3 <= value < 1e4 and value % 100:
        return f"{value:,.0f}"
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"


def _colours(n: int) -> list[Any]:
    return [matplotlib.colormaps["cividis"](x) for x in np.linspace(0.0, 0.8, max(n, 2))][:n]


def _title(cells: pd.DataFrame) -> str:
    first = cells.iloc[0]
    dataset, modality = str(first["dataset"]), str(first["modality"])
    name = f"{modality}: {dataset}" if dataset and modality and dataset != modality else dataset or modality
    return name + (f"\n{first['protocol']} protocol" if first["protocol"] else "")


def _log_axis(axis: Any, values: ArrayLike, label: str) -> None:
    """A logarithmic axis with ticks at the values themselves, thinned where labels would touch."""
    ticks: list[float] = []
    distinct = np.unique(np.asarray(values, dtype=float))
    span = math.log(distinct[-1] / distinct[0]) or 1.0
    for value in distinct[::-1]:
        if not ticks or math.log(ticks[-1] / value) > 0.13 * span:
            ticks.append(float(value))
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_label_text(label)


def _legend(ax: Axes, title: str) -> None:
    """Beside the panel, where no curve can run through it."""
    ax.legend(title=title, loc="center left", bbox_to_anchor=(1.0, 0.5), borderaxespad=0.3, handlelength=1.4)


def _keep_last_legend(panels: Sequence[Axes]) -> None:
    """One legend for a row of panels whose series are the same."""
    entries = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in panels]
    for ax, entry in zip(panels[:-1], entries, strict=False):
        if entry == entries[-1]:
            ax.get_legend().remove()


def _fine(values: ArrayLike, n: int = 60) -> Any:
    found = np.asarray(values, dtype=float)
    return np.geomspace(found.min(), found.max(), n)


def _list_laws(source: Any) -> list[Any]:
    laws = list(source.values()) if isinstance(source, Mapping) else [source]
    for law_ in laws:
        if not hasattr(law_, "predict") or not hasattr(law_, "cells"):
            raise Error(f"expected a scaling law or a mapping of them, found {type(law_).__name__}")
    return laws


def _split(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cells of models (params and step known, step above 0) and cells of baselines (no params)."""
    cells = results.cells(table)
    is_model = cells["params"].notna() & (cells["step"].fillna(0) > 0) & (cells["unit"] == "chunk")
    return cells[is_model], cells[cells["params"].isna()]


def _groups(table: pd.DataFrame) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """(model cells, baseline cells of the same data set) for every data set, protocol and mapping; text first."""
    models, baselines = _split(table)
    if models.empty:
        raise Error("nothing to draw: no cell has both params and a step above 0")
    order = {"text": 0, "image": 1, "speech": 2}
    groups = [group for _, group in models.groupby(["dataset", "modality", "protocol", "mapping"], sort=True)]
    groups.sort(key=lambda group: order.get(str(group["modality"].iloc[0]), 3))
    return [(group, baselines[baselines["dataset"] == group["dataset"].iloc[0]]) for group in groups]


def _last_step(cells: pd.DataFrame) -> pd.DataFrame:
    return cells[cells["step"] == cells["step"].max()].sort_values("params")


def _series(cells: pd.DataFrame, by: str) -> Iterator[tuple[float, pd.DataFrame, Any, str]]:
    """(value, its cells, colour, marker) for every value of params or step, ascending."""
    values = sorted(cells[by].unique())
    colours = _colours(len(values))
    for i, value in enumerate(values):
        other = "step" if by == "params" else "params"
        yield float(value), cells[cells[by] == value].sort_values(other), colours[i], _MARKERS[i % len(_MARKERS)]


# ---- the law ----


@_styled
def ratio_against_params(law: Any, ax: Axes | None = None) -> Axes:
    """Ratio against P, one curve of the law with its band for every S; points are the cells."""
    return _against(law, _axes(ax)[0, 0], "params", "step")


@_styled
def ratio_against_step(law: Any, ax: Axes | None = None) -> Axes:
    """Ratio against S, one curve of the law with its band for every P; points are the cells."""
    return _against(law, _axes(ax)[0, 0], "step", "params")


def _against(law: Any, ax: Axes, x_name: str, by: str) -> Axes:
    x = _fine(law.cells[x_name])
    for value, cells, colour, marker in _series(law.cells, by):
        at = {x_name: x, by: np.full_like(x, value)}
        low, high = law.band(at["params"], at["step"])
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(x, law.predict(at["params"], at["step"]), color=colour)
        ax.plot(cells[x_name].astype(float), cells["ratio"], marker, color=colour, label=_short(value), markeredgecolor="white", markeredgewidth=0.4)  # fmt: skip
    _log_axis(ax.xaxis, law.cells[x_name], PARAMS_LABEL if x_name == "params" else STEP_LABEL)
    ax.set_ylabel(RATIO_LABEL)
    ax.set_title(_title(law.cells))
    _legend(ax, "S" if by == "step" else "P")
    return ax


@_styled
def law(source: Any, axes: Any = None) -> Any:
    """Ratio against P (above) and against S (below), one column a law; an array of Axes [2, laws]."""
    laws = _list_laws(source)
    grid = _axes(axes, len(laws), 2)
    for column, one in enumerate(laws):
        ratio_against_params(one, grid[0, column])
        ratio_against_step(one, grid[1, column])
        grid[1, column].set_title("")
    for row in grid:
        _keep_last_legend(row)
        for ax in row[1:]:
            ax.set_ylabel("")
    return grid


@_styled
def surfaces(source: Any, axes: Any = None) -> Any:
    """The law's surface over P and S with the cells as points, all laws side by side; an array of 3-D Axes."""
    laws = _list_laws(source)
    grid = _axes(axes, len(laws), inches=(3.1, 2.9), subplot_kw={"projection": "3d"})[0]
    for ax, one in zip(grid, laws, strict=True):
        _surface(ax, one)
    return grid


def _surface(ax: Axes3D, law: Any) -> None:
    cells = law.cells
    p, s = np.meshgrid(_fine(cells["params"], 30), _fine(cells["step"], 30))
    ratio = law.predict(p, s)
    ax.plot_surface(np.log10(p), np.log10(s), ratio, cmap="cividis", alpha=0.75, linewidth=0, antialiased=True)
    x, y = np.log10(cells["params"].to_numpy(float)), np.log10(cells["step"].to_numpy(float))
    z = cells["ratio"].to_numpy(float)
    for xi, yi, observed, fitted in zip(x, y, z, cells["fitted"], strict=True):
        ax.plot([xi, xi], [yi, yi], [observed, fitted], color="0.3", linewidth=0.7)
    ax.scatter(x, y, z, c="black", s=9, depthshade=False)
    for axis, values, label in ((ax.xaxis, cells["params"], "P"), (ax.yaxis, cells["step"], "S")):
        distinct = np.unique(values.to_numpy(float))
        shown = [v for i, v in enumerate(distinct) if i == len(distinct) - 1 or math.log(distinct[-1] / v) > 0.25 * math.log(distinct[-1] / distinct[0])]  # fmt: skip
        shown = shown if len(shown) <= 4 else [shown[0], shown[len(shown) // 2], shown[-1]]
        axis.set_major_locator(FixedLocator([math.log10(v) for v in shown]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: _short(round(10**value, 6))))
        axis.set_label_text(label)
    ax.tick_params(labelsize=7.5, pad=-1)
    ax.text2D(0.02, 0.86, "ratio", transform=ax.transAxes)  # a label of the z axis is cut off by the layout
    ax.xaxis.labelpad = ax.yaxis.labelpad = -2
    ax.view_init(elev=22, azim=40)
    ax.set_box_aspect((1.0, 1.0, 0.85), zoom=0.92)
    ax.set_title(f"{_title(cells)}, $R^2$ = {law.r2:.3f}", y=0.97)


@_styled
def residuals(law: Any, ax: Axes | None = None) -> Axes:
    """Observed - fitted ratio against S, one series a size, over a band of plus and minus the rms error."""
    ax = _axes(ax)[0, 0]
    ax.axhspan(-law.rmse, law.rmse, color="0.92", linewidth=0)
    ax.axhline(0.0, color="0.3", linewidth=0.8)
    for value, cells, colour, marker in _series(law.cells, "params"):
        ax.plot(
            cells["step"].astype(float),
            cells["residual"],
            marker=marker,
            color=colour,
            linewidth=0.8,
            label=_short(value),
        )
    _log_axis(ax.xaxis, law.cells["step"], STEP_LABEL)
    ax.set_ylabel("observed - fitted ratio")
    ax.set_title(_title(law.cells))
    _legend(ax, "P (band:\nrms error)")
    return ax


# ---- the cells ----


def _spread(values: Sequence[float], gap: float) -> list[float]:
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


def _draw_baselines(ax: Axes, baselines: pd.DataFrame) -> None:
    """Horizontal lines, named beside the panel; names that would touch are moved apart and tied to their lines."""
    found = baselines.sort_values("ratio").reset_index(drop=True)
    low, high = ax.get_ylim()
    heights = _spread(found["ratio"].tolist(), 0.068 * (high - low))
    for i, (height, (_, row)) in enumerate(zip(heights, found.iterrows(), strict=True)):
        ratio = float(row["ratio"])
        ax.axhline(ratio, color="0.35", linewidth=0.9, linestyle=_LINES[i % len(_LINES)], zorder=1)
        name = f"{row['model']}{' (one stream)' if row['unit'] == 'stream' else ''} {ratio:.3f}"
        where = ax.get_yaxis_transform()
        ax.plot([1.0, 1.04], [ratio, height], color="0.5", linewidth=0.6, transform=where, clip_on=False)
        ax.text(1.05, height, name, transform=where, va="center", fontsize=7.5)


@_styled
def training_dynamics(table: pd.DataFrame, axes: Any = None) -> Any:
    """Ratio against S for every size as measured, with the chunks' standard error; one Axes a data set."""
    groups = _groups(table)
    grid = _axes(axes, len(groups))[0]
    for ax, (cells, _) in zip(grid, groups, strict=True):
        for value, one, colour, marker in _series(cells, "params"):
            ax.errorbar(one["step"].astype(float), one["ratio"], one["stderr"].fillna(0.0), marker=marker, color=colour, capsize=2, linewidth=1.0, label=_short(value))  # fmt: skip
        _log_axis(ax.xaxis, cells["step"], STEP_LABEL)
        ax.set_title(_title(cells))
        _legend(ax, "P (bars:\nstd. error)")
    _keep_last_legend(grid)
    grid[0].set_ylabel(RATIO_LABEL)
    return grid


@_styled
def baselines(table: pd.DataFrame, axes: Any = None) -> Any:
    """Ratio of every size at its last step against P, baseline compressors as lines; one Axes a data set."""
    groups = _groups(table)
    grid = _axes(axes, len(groups), inches=(3.3, 2.7))[0]
    for ax, (cells, lines) in zip(grid, groups, strict=True):
        last = _last_step(cells)
        ax.errorbar(last["params"].astype(float), last["ratio"], last["stderr"].fillna(0.0), marker="o", color=_colours(2)[0], capsize=2)  # fmt: skip
        everything = [*last["ratio"], *lines["ratio"]]
        room = 0.08 * (max(everything) - min(everything)) or 0.05
        ax.set_ylim(min(everything) - room, max(everything) + room)
        _log_axis(ax.xaxis, last["params"], PARAMS_LABEL)
        _draw_baselines(ax, lines)
        ax.set_title(f"{_title(cells)}, step {_short(float(last['step'].iloc[0]))}")
    grid[0].set_ylabel(RATIO_LABEL)
    return grid


@_styled
def chunk_distribution(rows: pd.DataFrame, axes: Any = None) -> Any:
    """Spread of the ratio over chunks for every size at its last step (box: quartiles, whiskers: 5 and 95 %, line:
    median, triangle: mean); one Axes a data set. Takes rows, one a chunk."""
    if "chunk" not in rows.columns:
        raise Error("chunk_distribution takes rows (one a chunk), found cells")
    groups = _groups(rows)
    grid = _axes(axes, len(groups))[0]
    for ax, (cells, _) in zip(grid, groups, strict=True):
        last = _last_step(cells)
        keys = list(results.CELL_KEY)
        parts = [rows.merge(last.iloc[[i]][keys], on=keys)["ratio"].to_numpy(float) for i in range(len(last))]
        ax.boxplot(
            parts, whis=(5, 95), showmeans=True, showfliers=False, patch_artist=True, widths=0.6,
            boxprops={"facecolor": "0.88"}, medianprops={"color": "black"},
            meanprops={"markerfacecolor": "black", "markeredgecolor": "black", "markersize": 4},
        )  # fmt: skip
        ax.set_xticks(range(1, len(last) + 1), [_short(float(value)) for value in last["params"]])
        ax.set_xlabel(PARAMS_LABEL)
        ax.grid(axis="x", visible=False)
        ax.set_title(f"{_title(cells)}, step {_short(float(last['step'].iloc[0]))}")
    grid[0].set_ylabel("ratio of a chunk")
    return grid


@_styled
def adjusted_ratio(table: pd.DataFrame, axes: Any = None, bytes_per_param: float = 2.0) -> Any:
    """Ratio with the model's own bytes added, (compressed + model) / original, against the size of the data: the curve
    of a model crosses the best baseline where it starts to pay. Last step of every size; 2 bytes a parameter: float16."""
    groups = _groups(table)
    grid = _axes(axes, len(groups), inches=(3.3, 2.7))[0]
    for ax, (cells, lines) in zip(grid, groups, strict=True):
        last = _last_step(cells)
        smallest, largest = bytes_per_param * last["params"].min(), bytes_per_param * last["params"].max()
        data_bytes = np.geomspace(0.5 * smallest, 1e3 * largest, 200)
        for value, one, colour, _ in _series(last, "params"):
            ratio = one["ratio"].iloc[0] + bytes_per_param * value / data_bytes
            ax.plot(data_bytes, ratio, color=colour, label=_short(value))
        ax.axhline(1.0, color="black", linewidth=0.8)
        ax.set(xscale="log", ylim=(0.0, 2.5), xlabel="bytes of data")
        _draw_baselines(ax, lines[lines["ratio"] < 2.5].nsmallest(1, "ratio"))
        ax.set_title(f"{_title(cells)}, step {_short(float(last['step'].iloc[0]))}")
        ax.legend(title=f"P, {bytes_per_param:g} bytes each", loc="upper right", labelspacing=0.25)
    grid[0].set_ylabel("(compressed + model) / original")
    return grid


# ---- published against lossless ----


def waterfall_parts(table: pd.DataFrame) -> pd.DataFrame:
    """Where the published and the lossless ratio of one model and step part, from the cells of both protocols.

    Columns part, ratio, total (whether it is a level, not a change). "tokens cut": the bytes that the published
    protocol did not score, at the rate of those it did. "dropped bit": one bit a byte, as paid by the lossless ascii
    mapping. "first token, context": what is left to the lossless ascii ratio (the first token paid for, the bytes
    beyond the cut at their own rate, the end of the payload). "other mapping": from ascii to the lossless mapping. Where
    ascii was not scored losslessly the last two are one part. Error if a protocol or the covered bytes are missing.
    """
    cells = results.cells(table)
    cells = cells[cells["unit"] == "chunk"]
    published = cells[cells["protocol"] == "published"]
    lossless = cells[cells["protocol"] == "lossless"].set_index("mapping")["ratio"]
    if len(published) != 1 or lossless.empty or lossless.index.has_duplicates:
        raise Error("a waterfall takes one model and step of one data set with its published and its lossless cells")
    start, covered = float(published["ratio"].iloc[0]), float(published["covered"].iloc[0])
    if not covered > 0:
        raise Error("the published cell does not record how many bytes it scored")
    target = next(name for name in ("bytes", "latin1", "shift", "ascii") if name in lossless.index)
    parts = [("published", start), ("tokens cut", start / covered - start), ("dropped bit", 1 / 8)]
    so_far = start / covered + 1 / 8
    if "ascii" in lossless.index and target != "ascii":
        parts.append(("first token, context", float(lossless["ascii"]) - so_far))
        parts.append((f"mapping {target}", float(lossless[target] - lossless["ascii"])))
    else:
        name = "first token, context" if target == "ascii" else "first token, mapping"
        parts.append((name, float(lossless[target]) - so_far))
    parts.append((f"lossless ({target})", float(lossless[target])))
    frame = pd.DataFrame(parts, columns=["part", "ratio"])
    return frame.assign(total=[True] + [False] * (len(parts) - 2) + [True])


@_styled
def waterfall(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """From the published to the lossless ratio of one model and step, part by part downwards (see waterfall_parts)."""
    parts = waterfall_parts(table)
    ax = _axes(ax, inches=(4.0, 2.6))[0, 0]
    dark, light = _colours(2)
    level = 0.0
    for i, row in enumerate(parts.itertuples()):
        start, end = (0.0, row.ratio) if row.total else (level, level + row.ratio)
        hatch = "" if row.total or row.ratio >= 0 else "////"
        ax.barh(i, abs(end - start), left=min(start, end), height=0.65, color=dark if row.total else light, edgecolor="black", linewidth=0.6, hatch=hatch, zorder=2)  # fmt: skip
        text = f"{row.ratio:.3f}" if row.total else f"{row.ratio:+.3f}"
        ax.annotate(text, (max(start, end), i), xytext=(3, 0), textcoords="offset points", va="center")
        if i < len(parts) - 1:
            ax.plot([end, end], [i + 0.325, i + 0.675], color="0.3", linewidth=0.7)
        level = end
    ax.set_yticks(range(len(parts)), list(parts["part"]))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.27)
    ax.set_xlim(left=0.0)
    ax.set_xlabel(RATIO_LABEL)
    first = results.cells(table).iloc[0]
    name = _title(pd.DataFrame([first])).partition("\n")[0]
    ax.set_title(f"{name}\n{first['model']}, step {_short(float(first['step']))}")
    return ax


# ---- data and positions ----


@_styled
def samples(chunks: Mapping[str, bytes], axes: Any = None, image_shape: tuple[int, int] = (32, 64), rate_hz: int = 16_000) -> Any:  # fmt: skip
    """One chunk of each modality as a person sees it: {"text": bytes, "image": grey bytes, "speech": int16 bytes}."""
    grid = _axes(axes, len(chunks))[0]
    for ax, (modality, data) in zip(grid, chunks.items(), strict=True):
        ax.set_title(f"{modality}, {len(data):,} bytes")
        ax.grid(visible=False)
        if modality == "image":
            ax.imshow(
                np.frombuffer(data, np.uint8)[: math.prod(image_shape)].reshape(image_shape),
                cmap="gray",
                vmin=0,
                vmax=255,
            )
            ax.set(xlabel="pixels", ylabel="pixels", anchor="N")
        elif modality == "speech":
            wave = np.frombuffer(data[: len(data) // 2 * 2], "<i2")
            ax.plot(1e3 * np.arange(len(wave)) / rate_hz, wave, color="black", linewidth=0.7)
            ax.set(xlabel="milliseconds", ylabel="16-bit sample")
        else:
            lines = textwrap.wrap(data.decode("utf-8", errors="replace"), 40)[:19]
            ax.text(
                0.0,
                1.0,
                "\n".join(lines).replace("$", r"\$"),
                family="monospace",
                fontsize=6.5,
                va="top",
                transform=ax.transAxes,
            )
            ax.set_axis_off()
    return grid


@_styled
def ratio_by_position(bits: Mapping[str, ArrayLike] | ArrayLike, ax: Axes | None = None, unit: str = "token") -> Axes:
    """Mean bits at every position of the chunk, with its standard error: what the context so far is worth.

    bits: [chunks, positions] (NaN where a chunk is shorter), or a mapping of such arrays by name. Positions are binned
    geometrically, so that the first few stay visible.
    """
    named = bits if isinstance(bits, Mapping) else {"": bits}
    ax = _axes(ax, inches=(3.6, 2.7))[0, 0]
    for i, (name, values) in enumerate(named.items()):
        array = np.asarray(values, dtype=float)
        if array.ndim != 2 or not np.isfinite(array).any():
            raise Error(
                f"bits by position: expected an array [chunks, positions] with values, found shape {array.shape}"
            )
        edges = np.unique(np.geomspace(1, array.shape[1] + 1, 25).astype(int))
        parts = [array[:, low - 1 : high - 1] for low, high in zip(edges[:-1], edges[1:], strict=True)]
        kept = [
            (math.sqrt(low * (high - 1)), part[np.isfinite(part)])
            for low, high, part in zip(edges[:-1], edges[1:], parts, strict=True)
        ]
        x, y, error = zip(
            *((at, part.mean(), part.std() / math.sqrt(len(part))) for at, part in kept if len(part)), strict=True
        )
        ax.errorbar(
            x,
            y,
            error,
            marker=_MARKERS[i % len(_MARKERS)],
            color=_colours(len(named))[i],
            capsize=1.5,
            linewidth=1.0,
            label=name,
        )
    ax.set(xscale="log", xlabel=f"position in the chunk ({unit}s)", ylabel=f"bits per {unit}", ylim=(0, None))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    if any(named):
        ax.legend()
    return ax


# ---- the standard set ----


def plot_all(
    table: pd.DataFrame,
    out_folder: str | os.PathLike[str],
    laws: Any = None,
    formats: Sequence[str] = ("png", "pdf"),
    resamples: int = 0,
) -> list[Path]:
    """Draws every figure that the table has data for and writes it in every format; returns the paths.

    One set for every protocol and mapping, named after it where there are several. laws: fitted before (else the
    additive law is fitted to every data set that allows it; figures of a law are left out where it cannot be fitted).
    """
    out_folder = Path(out_folder)
    groups = _groups(table)
    kinds = sorted({(str(cells["protocol"].iloc[0]), str(cells["mapping"].iloc[0])) for cells, _ in groups})
    paths: list[Path] = []
    for protocol, mapping in kinds:
        suffix = f"-{protocol}-{mapping}" if len(kinds) > 1 else ""
        part = _only(table, protocol, mapping)
        fitted = _fit_each(part) if laws is None else _matching(laws, protocol, mapping)
        for name, figure in _figures(part, fitted):
            paths += _write(figure, out_folder, name + suffix, formats)
    for name, figure in _waterfalls(table):
        paths += _write(figure, out_folder, name, formats)
    return paths


def _only(table: pd.DataFrame, protocol: str, mapping: str) -> pd.DataFrame:
    """The part of one protocol and mapping, baselines of any kept."""
    return table[((table["protocol"] == protocol) & (table["mapping"] == mapping)) | table["params"].isna()]


def _fit_each(table: pd.DataFrame) -> dict[str, Any]:
    from llmcomp.fit import fit_scaling_law

    laws = {}
    for cells, _ in _groups(table):
        try:
            laws[str(cells["dataset"].iloc[0])] = fit_scaling_law(cells, resamples=0)
        except Error:
            continue  # too few sizes or steps for a law; the other figures do not need one
    return laws


def _matching(laws: Any, protocol: str, mapping: str) -> dict[str, Any]:
    found = _list_laws(laws)
    return {one.name: one for one in found if tuple(one.cells.iloc[0][["protocol", "mapping"]]) == (protocol, mapping)}


def _figure(
    n_columns: int, n_rows: int = 1, inches: tuple[float, float] = PANEL_INCHES, **kwargs: Any
) -> tuple[Figure, Any]:
    """A figure outside pyplot's list, so that writing many of them keeps none open."""
    figure = Figure(figsize=(inches[0] * n_columns, inches[1] * n_rows), layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False, **kwargs)


def _figures(table: pd.DataFrame, laws: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    n_groups = len(_groups(table))
    draws: list[tuple[str, Callable[..., Any], tuple[float, float], int]] = [
        ("training-dynamics", training_dynamics, PANEL_INCHES, 1),
        ("baselines", baselines, (3.3, 2.7), 1),
        ("model-size-counted", adjusted_ratio, (3.3, 2.7), 1),
    ]
    if "chunk" in table.columns:
        draws.append(("chunks", chunk_distribution, PANEL_INCHES, 1))
    with matplotlib.rc_context(dict(STYLE)):
        for name, draw, inches, n_rows in draws:
            figure, axes = _figure(n_groups, n_rows, inches)
            draw(table, axes)
            yield name, figure
        if laws:
            figure, axes = _figure(len(laws), 1, (3.1, 2.9), subplot_kw={"projection": "3d"})
            surfaces(laws, axes)
            yield "surfaces", figure
            figure, axes = _figure(len(laws), 2)
            law(laws, axes)
            yield "law", figure
            figure, axes = _figure(len(laws))
            for ax, one in zip(axes[0], laws.values(), strict=True):
                residuals(one, ax)
            _keep_last_legend(axes[0])
            for ax in axes[0, 1:]:
                ax.set_ylabel("")
            yield "residuals", figure


def _part_names(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def _waterfalls(table: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """The largest model at its last step, where it was scored under both protocols; one panel a data set."""
    chosen: list[pd.DataFrame] = []
    groups = pd.concat([cells for cells, _ in _groups(table)])
    for _, cells in groups.groupby("dataset", sort=False):
        largest = _last_step(cells).iloc[-1]
        part = cells[(cells["model"] == largest["model"]) & (cells["step"] == largest["step"])]
        try:
            waterfall_parts(part)
        except Error:
            continue
        chosen.append(part)
    if chosen:
        with matplotlib.rc_context(dict(STYLE)):
            figure, axes = _figure(len(chosen), 1, (3.1, 2.4))
            for ax, part in zip(axes[0], chosen, strict=True):
                waterfall(part, ax)
                if ax is not axes[0, 0] and _part_names(ax) == _part_names(axes[0, 0]):
                    ax.tick_params(labelleft=False)
        yield "published-to-lossless", figure


def _write(figure: Figure, folder: Path, name: str, formats: Sequence[str]) -> list[Path]:
    """Writes beside and renames, so that a figure is there whole or not at all."""
    paths = []
    for kind in formats:
        path = folder / f"{name}.{kind}"
        beside = folder / f".{name}.{os.getpid()}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with matplotlib.rc_context(dict(STYLE)):
                figure.savefig(beside, format=kind)
            os.replace(beside, path)
        except OSError as error:
            raise Error(f"cannot write {path}: {error.strerror or error}") from error
        paths.append(path)
    return paths
