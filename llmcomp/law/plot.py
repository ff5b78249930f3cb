"""Rows and laws -> matplotlib Axes: every function draws on the Axes it is given, or on new ones, and returns them.

What may not live here: fitting, scoring, reading files. A law is anything with `cells`, `predict` and `band`
(scaling_law.ScalingLaw); several laws are a mapping of them.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from mpl_toolkits.mplot3d.axes3d import Axes3D
from numpy.typing import ArrayLike, NDArray

from llmcomp import results
from llmcomp.errors import Error
from llmcomp.law.style import (
    BARS_LABEL,
    LINES,
    MARKERS,
    PARAMS_LABEL,
    RATIO_LABEL,
    STEP_LABEL,
    STYLE,  # noqa: F401, a public name of this module
    axes_of,
    baseline_name,
    colours,
    draw_baselines,
    fine_range,
    groups_of,
    keep_last_legend,
    label_of,
    last_step,
    legend_beside,
    log_axis,
    modality_rank,
    series_of,
    short_number,
    styled,
    title_of,
)


def laws_of(source: Any) -> list[Any]:
    laws = list(source.values()) if isinstance(source, Mapping) else [source]
    for law_ in laws:
        if not hasattr(law_, "predict") or not hasattr(law_, "cells"):
            raise Error(f"expected a scaling law or a mapping of them, found {type(law_).__name__}")
    return sorted(laws, key=lambda law_: modality_rank(law_.cells))


@styled
def ratio_against_params(law: Any, ax: Axes | None = None) -> Axes:
    """Ratio against the law's first axis (P), one curve of the law with its band for every value of the second (S);
    points are the cells."""
    return _against(law, axes_of(ax)[0, 0], 0)


@styled
def ratio_against_step(law: Any, ax: Axes | None = None) -> Axes:
    """Ratio against the law's last axis (S), one curve of the law with its band for every value of the first (P)."""
    return _against(law, axes_of(ax)[0, 0], len(law.axes) - 1)


def _against(law: Any, ax: Axes, index: int) -> Axes:
    axis, others = law.axes[index], [one for one in law.axes if one is not law.axes[index]]
    x = fine_range(law.cells[axis.column])
    everything = [(math.nan, law.cells.sort_values(axis.column), colours(2)[0], MARKERS[0])]
    for value, cells, colour, marker in series_of(law.cells, others[0].column) if others else everything:
        at = {axis.name: x} | {one.name: np.full_like(x, value) for one in others}
        low, high = law.band(**at)
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(x, law.predict(**at), color=colour)
        edge: Any = {"markeredgecolor": "white", "markeredgewidth": 0.4, "markersize": 5.2}
        label = short_number(value) if others else "cells"
        ax.plot(cells[axis.column].astype(float), cells["ratio"], marker, color=colour, label=label, **edge)
    log_axis(ax.xaxis, law.cells[axis.column], label_of(axis))
    ax.set_ylabel(RATIO_LABEL)
    ax.set_title(title_of(law.cells))
    name = f"{others[0].letter} " if others else ""
    legend_beside(ax, f"{name}(band:\n{100 * law.level:g} % profile\ninterval of\nthe law)")
    return ax


@styled
def law(source: Any, axes: Any = None) -> Any:
    """Ratio against P (above) and against S (below), one column a law; an array of Axes [2, laws], or [1, laws] for
    laws of one axis. Bands are the law's profile interval at its level."""
    laws = laws_of(source)
    n_rows = max(len(one.axes) for one in laws)
    grid = axes_of(axes, len(laws), n_rows)
    for column, one in enumerate(laws):
        for row in range(len(one.axes)):
            _against(one, grid[row, column], row)
            if row:
                grid[row, column].set_title("")
    for row in grid:
        keep_last_legend(row)
        for ax in row[1:]:
            ax.set_ylabel("")
    return grid


@styled
def surfaces(source: Any, axes: Any = None) -> Any:
    """The law's surface over P and S with the cells as points, all laws side by side; an array of 3-D Axes."""
    laws = laws_of(source)
    grid = axes_of(axes, len(laws), inches=(3.1, 2.9), subplot_kw={"projection": "3d"})[0]
    for ax, one in zip(grid, laws, strict=True):
        _surface(ax, one)
    return grid


def _surface(ax: Axes3D, law: Any) -> None:
    cells = law.cells
    if len(law.axes) != 2:
        raise Error(f"{law.name}: a surface needs a law of two axes")
    first, last = law.axes
    p, s = np.meshgrid(fine_range(cells[first.column], 30), fine_range(cells[last.column], 30))
    ratio = law.predict(p, s)
    ax.plot_surface(np.log10(p), np.log10(s), ratio, cmap="cividis", alpha=0.75, linewidth=0, antialiased=True)
    x, y = (np.log10(cells[axis.column].to_numpy(float)) for axis in law.axes)
    z = cells["ratio"].to_numpy(float)
    for xi, yi, observed, fitted in zip(x, y, z, cells["fitted"], strict=True):
        ax.plot([xi, xi], [yi, yi], [observed, fitted], color="0.3", linewidth=0.7)
    ax.scatter(x, y, z, c="black", s=9, depthshade=False)
    for axis, values, label in (
        (ax.xaxis, cells[first.column], first.letter),
        (ax.yaxis, cells[last.column], last.letter),
    ):
        distinct = np.unique(values.to_numpy(float))
        far = 0.25 * math.log(distinct[-1] / distinct[0])
        shown = [*(v for v in distinct[:-1] if math.log(distinct[-1] / v) > far), distinct[-1]]
        shown = shown if len(shown) <= 4 else [shown[0], shown[len(shown) // 2], shown[-1]]
        axis.set_major_locator(FixedLocator([math.log10(v) for v in shown]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(round(10**value, 6))))
        axis.set_label_text(label)
    ax.tick_params(labelsize=7.5, pad=-1)
    # The two axes meet in the near corner: their labels run away from it.
    for axis, alignment in ((ax.xaxis, "left"), (ax.yaxis, "right")):
        for label in axis.get_ticklabels():
            label.set_horizontalalignment(alignment)
    ax.text2D(0.02, 0.86, "ratio", transform=ax.transAxes)  # a label of the z axis is cut off by the layout
    ax.xaxis.labelpad = ax.yaxis.labelpad = 1
    ax.view_init(elev=22, azim=40)
    ax.set_box_aspect((1.0, 1.0, 0.85), zoom=0.92)
    ax.set_title(f"{title_of(cells)}, $R^2$ = {law.r2:.3f}", y=0.97)


@styled
def residuals(law: Any, ax: Axes | None = None) -> Axes:
    """Observed - fitted ratio against the law's last axis (S), one series a value of the first (P), over a band of plus
    and minus the rms error."""
    ax = axes_of(ax)[0, 0]
    ax.axhspan(-law.rmse, law.rmse, color="0.92", linewidth=0)
    ax.axhline(0.0, color="0.3", linewidth=0.8)
    first, last = law.axes[0], law.axes[-1]
    everything = [(math.nan, law.cells.sort_values(last.column), colours(2)[0], MARKERS[0])]
    for value, cells, colour, marker in series_of(law.cells, first.column) if len(law.axes) > 1 else everything:
        label = short_number(value) if len(law.axes) > 1 else "cells"
        x = cells[last.column].astype(float)
        ax.plot(x, cells["residual"], marker=marker, color=colour, linewidth=0.8, label=label)
    log_axis(ax.xaxis, law.cells[last.column], label_of(last))
    ax.set_ylabel("observed - fitted ratio")
    ax.set_title(title_of(law.cells))
    legend_beside(ax, f"{first.letter} (band:\nrms error)" if len(law.axes) > 1 else "band:\nrms error")
    return ax


@styled
def holdout(found: Any, axes: Any = None) -> Any:
    """What laws predicted of cells that they had not seen (ScalingLaw.holdout): line and band are the prediction and
    its predictive interval, points the held-out cells, grey points those that the law saw; one Axes a law."""
    grid = axes_of(axes, len(found.laws), inches=(3.1, 2.9))[0]
    panels = sorted(found.laws.items(), key=lambda one: modality_rank(next(iter(one[1].values())).cells))
    for ax, (name, by_kept) in zip(grid, panels, strict=True):
        _predictions(ax, found, name, by_kept)
    keep_last_legend(grid)
    for ax in grid[1:]:
        ax.set_ylabel("")
    return grid


def _predictions(ax: Axes, found: Any, name: str, by_kept: Mapping[float, Any]) -> None:
    table = found.table[found.table["law"] == name]
    law = next(iter(by_kept.values()))
    others = [one for one in law.axes if one.column != found.column]
    across = others[0] if others else law.axes[0]
    first = by_kept[min(by_kept)].cells
    ax.plot(first[across.column].astype(float), first["ratio"], ".", color="0.65", markersize=4, label="seen")
    everywhere = pd.concat([table[across.column], first[across.column].astype(float)])
    for value, cells, colour, marker in series_of(table, found.column):
        predictor = by_kept[float(cells["kept"].iloc[0])]
        x = fine_range(everywhere)
        at = {one.name: np.full_like(x, value) if one.column == found.column and others else x for one in law.axes}
        low, high = predictor.predict_interval(**at)
        ax.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        for end in (low, high):  # bands lie on one another: their edges tell them apart
            ax.plot(x, end, color=colour, linewidth=0.7, linestyle=LINES[1])
        ax.plot(x, predictor.predict(**at), color=colour)
        label = short_number(value) if others else "held out"
        edge: Any = {"markeredgecolor": "white", "markeredgewidth": 0.4, "markersize": 5.5, "label": label}
        ax.plot(cells[across.column], cells["ratio"], marker, color=colour, **edge)
        if not others:
            break
    log_axis(ax.xaxis, everywhere, label_of(across))
    ax.set_ylabel(RATIO_LABEL)
    inside = f"{int(table['inside'].sum())} of {len(table)} inside"
    ax.set_title(f"{title_of(law.cells)}\n{inside}, rms error {np.sqrt((table['error'] ** 2).mean()):.4f}")
    letter = next(one.letter for one in law.axes if one.column == found.column)
    legend_beside(ax, f"{letter} (band:\n{100 * found.level:g} % predictive\ninterval)")


@styled
def training_dynamics(table: pd.DataFrame, axes: Any = None) -> Any:
    """Ratio against S for every size as measured, with the chunks' standard error; one Axes a data set."""
    groups = groups_of(table)
    grid = axes_of(axes, len(groups))[0]
    for ax, (cells, _) in zip(grid, groups, strict=True):
        for value, one, colour, marker in series_of(cells, "params"):
            bars = {"yerr": one["stderr"].fillna(0.0), "capsize": 2}
            x, label = one["step"].astype(float), short_number(value)
            ax.errorbar(x, one["ratio"], marker=marker, color=colour, linewidth=1.0, label=label, **bars)
        log_axis(ax.xaxis, cells["step"], STEP_LABEL)
        ax.set_title(title_of(cells))
        legend_beside(ax, "P (bars:\nstd. error)")
    keep_last_legend(grid)
    grid[0].set_ylabel(RATIO_LABEL)
    return grid


@styled
def baselines(table: pd.DataFrame, axes: Any = None) -> Any:
    """Ratio of every size at its last step against P, baseline compressors as lines; one Axes a data set.

    Baselines see the models' chunks one at a time, as the models do; of those that saw them as one stream only the best
    is drawn. Random baselines, mostly far above, are drawn where there are no others.
    """
    groups = groups_of(table)
    if all(lines.empty for _, lines in groups):
        raise Error("no baseline in the table: sweep with baselines adds them")
    grid = axes_of(axes, len(groups), inches=(4.4, 2.9))[0]
    for ax, (cells, lines) in zip(grid, groups, strict=True):
        last, lines = last_step(cells), lines if _compressors(lines).empty else _compressors(lines)
        streams = lines[lines["unit"] == "stream"]
        lines = pd.concat([lines[lines["unit"] == "chunk"], streams.nsmallest(1, "ratio")])
        x, bars = last["params"].astype(float), last["stderr"].fillna(0.0)
        ax.errorbar(x, last["ratio"], bars, marker="o", color=colours(2)[0], capsize=2)
        everything = [*(last["ratio"] - bars), *(last["ratio"] + bars), *lines["ratio"]]
        room = 0.08 * (max(everything) - min(everything)) or 0.05
        ax.set_ylim(min(everything) - room, max(everything) + room)
        log_axis(ax.xaxis, last["params"], PARAMS_LABEL)
        draw_baselines(ax, lines)
        ax.set_title(f"{title_of(cells)}, step {short_number(float(last['step'].iloc[0]))}")
    grid[0].set_ylabel(f"{RATIO_LABEL}\n{BARS_LABEL}")
    return grid


@styled
def chunk_distribution(rows: pd.DataFrame, axes: Any = None) -> Any:
    """Spread of the ratio over chunks for every size at its last step (box: quartiles, whiskers: 5 and 95 %, line:
    median, triangle: mean); one Axes a data set. Takes rows, one a chunk."""
    if "chunk" not in rows.columns:
        raise Error("chunk_distribution takes rows (one a chunk), found cells")
    rows = results.check_rows(rows)
    groups = groups_of(rows)
    grid = axes_of(axes, len(groups))[0]
    for ax, (cells, _) in zip(grid, groups, strict=True):
        last = last_step(cells)
        keys = list(results.CELL_KEY)
        parts = [rows.merge(last.iloc[[i]][keys], on=keys)["ratio"].to_numpy(float) for i in range(len(last))]
        ax.bxp(
            [_box(ratios) for ratios in parts], showmeans=True, showfliers=False, patch_artist=True, widths=0.6,
            boxprops={"facecolor": "0.88"}, medianprops={"color": "black"},
            meanprops={"markerfacecolor": "black", "markeredgecolor": "black", "markersize": 4},
        )  # fmt: skip
        ax.set_xticks(range(1, len(last) + 1), [short_number(float(value)) for value in last["params"]])
        ax.set_xlabel(PARAMS_LABEL)
        ax.grid(axis="x", visible=False)
        ax.set_title(f"{title_of(cells)}, step {short_number(float(last['step'].iloc[0]))}")
    grid[0].set_ylabel("ratio of a chunk")
    box: Any = {"facecolor": "0.88", "edgecolor": "black"}
    mean: Any = {"marker": "^", "color": "black", "markersize": 4, "linestyle": "none"}
    shown = [
        Patch(label="box: quartiles", **box),
        Line2D([], [], color="black", linewidth=1.0, label="line: median,\nwhiskers:\n5 to 95 %"),
    ]
    grid[-1].legend(
        handles=[*shown, Line2D([], [], label="mean", **mean)], loc="center left", bbox_to_anchor=(1.0, 0.5),
        handlelength=1.4,
    )  # fmt: skip
    return grid


def _box(ratios: NDArray[np.float64]) -> dict[str, float]:
    """Where a box, its whiskers, its line and its mark stand. Axes.boxplot ends whiskers at an observed value, which
    for a few chunks is the box itself; a percentile is what the legend says."""
    low, q1, median, q3, high = (float(value) for value in np.percentile(ratios, (5, 25, 50, 75, 95)))
    return {"whislo": low, "q1": q1, "med": median, "q3": q3, "whishi": high, "mean": float(ratios.mean())}


@styled
def ratio_against_vocabulary(table: pd.DataFrame, vocab_sizes: Mapping[str, int], axes: Any = None) -> Any:
    """Ratio against the entries of the vocabulary, with the chunks' standard error and the best baseline; one Axes a
    data set. vocab_sizes: entries by model name (llmcomp.pico.VOCABULARIES); other models are left out."""
    groups = groups_of(table[table["model"].isin(list(vocab_sizes)) | table["params"].isna()])
    grid = axes_of(axes, len(groups), inches=(3.6, 2.7))[0]
    for ax, (cells, lines) in zip(grid, groups, strict=True):
        entries = cells["model"].map(dict(vocab_sizes)).astype(float)
        if entries.duplicated().any():
            raise Error("a vocabulary appears twice: expected one model and step for each")
        cells, entries = cells.loc[entries.sort_values().index], entries.sort_values()
        bars = cells["stderr"].fillna(0.0)
        ax.errorbar(entries, cells["ratio"], bars, marker="o", color=colours(2)[0], capsize=2)
        log_axis(ax.xaxis, entries, "entries of the vocabulary")
        draw_baselines(ax, _best_baseline(lines))
        ax.set_title(title_of(cells))
    grid[0].set_ylabel(f"{RATIO_LABEL}\n{BARS_LABEL}")
    return grid


def break_even(table: pd.DataFrame, bytes_per_param: float = 2.0) -> pd.DataFrame:
    """How many bytes of data it takes until a model pays for its own bytes; every size at its last step.

    Columns dataset, protocol, mapping, model, params, step, ratio, model_bytes, saves_from (bytes of data from which
    data and model are below the original), baseline, baseline_ratio, beats_from (from which they are below the best
    baseline; inf where the model's ratio is not; baseline "" and NaN where the table has none).
    """
    return pd.concat([_pays(*group, bytes_per_param) for group in groups_of(table)], ignore_index=True)


def _compressors(lines: pd.DataFrame) -> pd.DataFrame:
    """The baselines without those of random numbers and random weights, which compress nothing."""
    return lines[~lines["model"].str.startswith("random")]


def _best_baseline(lines: pd.DataFrame) -> pd.DataFrame:
    """The best compressor of the table, one row or none."""
    return _compressors(lines).nsmallest(1, "ratio")


def _pays(cells: pd.DataFrame, lines: pd.DataFrame, bytes_per_param: float) -> pd.DataFrame:
    last = last_step(cells)
    kept = ["dataset", "protocol", "mapping", "model", "params", "step", "ratio"]
    found = last[kept].assign(model_bytes=bytes_per_param * last["params"].astype(float))
    name, bound = "", math.nan
    for _, best in _best_baseline(lines).iterrows():
        name, bound = baseline_name(best), float(best["ratio"])
    ratio = found["ratio"].to_numpy(float)
    for column, against in (("saves_from", 1.0), ("beats_from", bound)):
        gain = np.maximum(against - ratio, 0.0)
        with np.errstate(divide="ignore"):
            found[column] = found["model_bytes"] / gain
    return found.assign(baseline=name, baseline_ratio=bound)


@styled
def adjusted_ratio(table: pd.DataFrame, axes: Any = None, bytes_per_param: float = 2.0) -> Any:
    """Ratio with the model's own bytes added, (compressed + model) / original, against the size of the data; a marker
    where a model starts to beat the best baseline (see break_even). Last step of every size; 2 bytes: float16."""
    groups = groups_of(table)
    grid = axes_of(axes, len(groups), inches=(4.4, 2.9))[0]
    for ax, (cells, lines) in zip(grid, groups, strict=True):
        last = last_step(cells)
        points = _pays(cells, lines, bytes_per_param).set_index("model")
        smallest, largest = points["model_bytes"].min(), points["model_bytes"].max()
        data_bytes = np.geomspace(0.5 * smallest, 1e3 * largest, 200)
        for value, one, colour, marker in series_of(last, "params"):
            ratio, point = one["ratio"].iloc[0], points.loc[one["model"].iloc[0]]
            ax.plot(data_bytes, ratio + bytes_per_param * value / data_bytes, color=colour, label=short_number(value))
            if point["beats_from"] <= data_bytes[-1]:
                ax.plot(point["beats_from"], point["baseline_ratio"], marker, color=colour, zorder=3)
        ax.axhline(1.0, color="black", linewidth=0.8)
        mark = "\n(marker: from here on below the baseline)" if (points["beats_from"] <= data_bytes[-1]).any() else ""
        ax.set(xscale="log", ylim=(0.0, 1.6), xlabel=f"bytes of data{mark}")
        ax.xaxis.set_minor_locator(NullLocator())
        draw_baselines(ax, _best_baseline(lines))
        ax.set_title(f"{title_of(cells)}, step {short_number(float(last['step'].iloc[0]))}")
        plain: Any = {"frameon": True, "framealpha": 1.0, "edgecolor": "none"}
        plain |= {"labelspacing": 0.25, "ncols": 2, "columnspacing": 1.0}
        ax.legend(title=f"P, {bytes_per_param:g} bytes each", loc="upper right", **plain)
    keep_last_legend(grid)
    grid[0].set_ylabel("(compressed + model) / original")
    return grid


def waterfall_parts(table: pd.DataFrame) -> pd.DataFrame:
    """Where the published and the lossless ratio of one model and step part, from the cells of both protocols.

    Columns part, ratio, total (whether it is a level, not a change). "tokens cut": the bytes that the published
    protocol did not score, at the rate of those it did. "dropped bit": one bit a byte, as paid by the lossless ascii
    mapping. "first token, context": what is left to the lossless ascii ratio (the first token paid for, the bytes
    beyond the cut at their own rate, the end of the payload). "mapping": from ascii to the lossless mapping. Where
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


@styled
def waterfall(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """From the published to the lossless ratio of one model and step, part by part downwards (see waterfall_parts)."""
    parts = waterfall_parts(table)
    ax = axes_of(ax, inches=(4.0, 2.6))[0, 0]
    dark, light = colours(2)
    level = 0.0
    for i, (ratio, total) in enumerate(zip(parts["ratio"].astype(float), parts["total"], strict=True)):
        start, end = (0.0, ratio) if total else (level, level + ratio)
        hatch = "" if total or ratio >= 0 else "////"
        look: Any = {"color": dark if total else light, "edgecolor": "black", "linewidth": 0.6, "hatch": hatch}
        ax.barh(i, abs(end - start), left=min(start, end), height=0.65, zorder=2, **look)
        text = f"{ratio:.3f}" if total else f"{ratio:+.3f}"
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
    name = title_of(pd.DataFrame([first])).partition("\n")[0]
    ax.set_title(f"{name}\n{first['model']}, step {short_number(float(first['step']))}")
    return ax


@styled
def samples(
    chunks: Mapping[str, bytes], axes: Any = None, image_shape: tuple[int, int] = (32, 64), rate_hz: int = 16_000
) -> Any:
    """One chunk of each modality as a person sees it: {"text": bytes, "image": grey bytes, "speech": int16 bytes}."""
    grid = axes_of(axes, len(chunks))[0]
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


@styled
def ratio_by_position(bits: Mapping[str, ArrayLike] | ArrayLike, ax: Axes | None = None, unit: str = "token") -> Axes:
    """Mean bits at every position of the chunk, with its standard error: what the context so far is worth.

    bits: [chunks, positions] (NaN where a chunk is shorter), or a mapping of such arrays by name. Positions are binned
    geometrically, so that the first few stay visible.
    """
    named = bits if isinstance(bits, Mapping) else {"": bits}
    ax = axes_of(ax, inches=(3.6, 2.7))[0, 0]
    for i, (name, values) in enumerate(named.items()):
        array = np.asarray(values, dtype=float)
        if array.ndim != 2 or not np.isfinite(array).any():
            raise Error(
                f"bits by position: expected an array [chunks, positions] with values, found shape {array.shape}"
            )
        edges = np.unique(np.geomspace(1, array.shape[1] + 1, 25).astype(int))
        parts = [array[:, low - 1 : high - 1] for low, high in pairwise(edges)]
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
            marker=MARKERS[i % len(MARKERS)],
            color=colours(len(named))[i],
            capsize=1.5,
            linewidth=1.0,
            label=name,
        )
    ax.set(xscale="log", xlabel=f"position in the chunk ({unit}s)", ylabel=f"bits per {unit}", ylim=(0, None))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    if any(named):
        ax.legend()
    return ax
