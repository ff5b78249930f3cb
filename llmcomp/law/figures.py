"""All figures that a table has data for, written to a folder: which are drawn, their names and formats.

What may not live here: the figures themselves (llmcomp.law.plot).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmcomp.atomic_write import written_beside
from llmcomp.errors import Error
from llmcomp.law.fit import fit_scaling_law
from llmcomp.law.holdout import joined
from llmcomp.law.plot import (
    adjusted_ratio,
    baselines,
    chunk_distribution,
    holdout,
    law,
    laws_of,
    residuals,
    surfaces,
    training_dynamics,
    waterfall,
    waterfall_parts,
)
from llmcomp.law.style import PANEL_INCHES, STYLE, groups_of, keep_last_legend, last_step, new_figure


def plot_all(
    table: pd.DataFrame,
    out_folder: str | os.PathLike[str],
    laws: Any = None,
    formats: str | Sequence[str] = ("png", "pdf"),
    resamples: int = 0,
) -> list[Path]:
    """Draws every figure that the table has data for and writes it in every format; returns the paths.

    One set for every protocol and mapping, named after it where there are several. laws: fitted before (else the
    additive law is fitted to every data set that allows it; figures of a law are left out where it cannot be fitted).
    """
    out_folder = Path(out_folder)
    formats = [formats] if isinstance(formats, str) else list(formats)
    known = sorted(Figure().canvas.get_supported_filetypes())
    if unknown := [kind for kind in formats if kind not in known]:
        raise Error(f"no figure has format {unknown[0]!r}; there are {', '.join(known)}")
    groups = groups_of(table)
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
    """The part of one protocol and mapping; compressors, which have no mapping, are kept with any."""
    of_compressors = table["params"].isna() & (table["mapping"] == "")
    return table[((table["protocol"] == protocol) & (table["mapping"] == mapping)) | of_compressors]


def _fit_each(table: pd.DataFrame) -> dict[str, Any]:
    laws = {}
    for cells, _ in groups_of(table):
        try:
            laws[str(cells["dataset"].iloc[0])] = fit_scaling_law(cells, resamples=0)
        except Error:
            continue  # too few sizes or steps for a law; the other figures do not need one
    return laws


def _matching(laws: Any, protocol: str, mapping: str) -> dict[str, Any]:
    found = laws_of(laws)
    return {one.name: one for one in found if tuple(one.cells.iloc[0][["protocol", "mapping"]]) == (protocol, mapping)}


def _figures(table: pd.DataFrame, laws: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    groups = groups_of(table)
    n_groups = len(groups)
    draws: list[tuple[str, Callable[..., Any], tuple[float, float], int]] = [
        ("training-dynamics", training_dynamics, PANEL_INCHES, 1),
        ("model-size-counted", adjusted_ratio, (4.4, 2.9), 1),
    ]
    if any(not lines.empty for _, lines in groups):
        draws.append(("baselines", baselines, (4.4, 2.9), 1))
    if "chunk" in table.columns:
        draws.append(("chunks", chunk_distribution, PANEL_INCHES, 1))
    with matplotlib.rc_context(STYLE):
        for name, draw, inches, n_rows in draws:
            figure, axes = new_figure(n_groups, n_rows, inches)
            draw(table, axes)
            yield name, figure
        if laws:
            n_axes = max(len(one.axes) for one in laws.values())
            if n_axes == 2:
                figure, axes = new_figure(len(laws), 1, (3.1, 2.9), subplot_kw={"projection": "3d"})
                surfaces(laws, axes)
                yield "surfaces", figure
            figure, axes = new_figure(len(laws), n_axes)
            law(laws, axes)
            yield "law", figure
            figure, axes = new_figure(len(laws))
            for ax, one in zip(axes[0], laws.values(), strict=True):
                residuals(one, ax)
            keep_last_legend(axes[0])
            for ax in axes[0, 1:]:
                ax.set_ylabel("")
            yield "residuals", figure
            with contextlib.suppress(Error):  # too few sizes to hold one out
                found = joined([one.holdout() for one in laws.values()])
                figure, axes = new_figure(len(laws), 1, (3.1, 2.9))
                holdout(found, axes)
                yield "holdout", figure


def _part_names(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def _waterfalls(table: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """The largest model at its last step, where it was scored under both protocols; one panel a data set."""
    chosen: list[pd.DataFrame] = []
    groups = pd.concat([cells for cells, _ in groups_of(table)])
    for _, cells in groups.groupby("dataset", sort=False):
        largest = last_step(cells).iloc[-1]
        part = cells[(cells["model"] == largest["model"]) & (cells["step"] == largest["step"])]
        try:
            waterfall_parts(part)
        except Error:
            continue
        chosen.append(part)
    if chosen:
        with matplotlib.rc_context(STYLE):
            figure, axes = new_figure(len(chosen), 1, (3.1, 2.4))
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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with matplotlib.rc_context(STYLE), written_beside(path) as file:
                figure.savefig(file, format=kind)
            figure.set_layout_engine("none")  # laid out once; the other formats take the same places
        except OSError as error:
            raise Error(f"cannot write {path}: {error.strerror or error}") from error
        paths.append(path)
    return paths
