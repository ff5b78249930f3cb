"""A law's report: what a reader needs to judge a fit or to repeat it, as Markdown or LaTeX.

The headings follow the checklist of (Mis)Fitting (arXiv 2502.18969). What the rows do not record is said to be so, not
left out. What may not live here: fitting; a law here is anything with the attributes of ScalingLaw.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import scipy

from llmcomp.errors import Error
from llmcomp.law.projection import N_GRID, N_STARTS
from llmcomp.law.text import latex_table, markdown_table, number, short_number, span, tex_text

_MOST_LISTED = 12


@dataclass(frozen=True)
class Section:
    """A heading, what is said under it (label, text), and perhaps a table (head, rows)."""

    title: str
    items: list[tuple[str, str]]
    table: tuple[list[str], list[list[str]]] | None = None


def report_of(law: Any, format: str) -> str:
    """See ScalingLaw.report."""
    if format not in ("markdown", "latex"):
        raise Error(f"format {format!r} is not one of markdown, latex")
    sections = [_hypothesis(law), _data(law), _training(law), _fit(law), _result(law), *_held_out(law), _software()]
    title = f"Scaling law: {law.name}"
    return _markdown(title, sections) if format == "markdown" else _latex(title, sections)


def _hypothesis(law: Any) -> Section:
    bounded = [key for key, held in zip(law.form.coefficients, law.problem.nonneg, strict=True) if held]
    sizes = [axis for axis in law.axes if axis.is_size]
    counted = {"params": "all parameters, embeddings included", "params_nonembedding": "parameters without embeddings"}
    items = [
        ("Form", f"{law.form.name}: {law.formula}"),
        ("Variables", law.units),
        ("Free parameters", f"{law.n_free}: {', '.join(law.values)}"),
        ("Bounds", f"{', '.join(bounded)} at or above 0" if bounded else "none"),
        ("Size counts", "; ".join(counted[axis.name] for axis in sizes) or "no size among the variables"),
    ]
    return Section("Hypothesis", items)


def _data(law: Any) -> Section:
    cells = law.cells
    origin = {key: sorted({str(value) for value in cells[key]} - {""}) for key in _ORIGIN if key in cells.columns}
    items = [(_ORIGIN[key], ", ".join(values[:_MOST_LISTED])) for key, values in origin.items() if values]
    items.append(("Measured", "ratio of compressed to original size, one value a cell (a model at a step)"))
    items.append(("Cells", str(len(cells))))
    for axis in law.axes:
        values = np.unique(cells[axis.column].to_numpy(float))
        more = f", ... ({len(values)})" if len(values) > _MOST_LISTED else ""
        listed = ", ".join(short_number(value) for value in values[:_MOST_LISTED])
        items.append((f"{axis.label.capitalize()} {axis.letter}", listed + more))
    if "chunks" in cells.columns:
        chunks, total = cells["chunks"].astype(float), cells["bytes_in"].astype(float)
        items.append(("Chunks a cell", _range(chunks)))
        items.append(("Bytes a cell", _range(total)))
    if "covered" in cells.columns and cells["covered"].notna().any():
        items.append(("Bytes that were scored", f"{100 * cells['covered'].min():.1f} % in the cell with the least"))
    items.append(("Left out, repeated", "; ".join(law.notes) or "no cell"))
    return Section("Data", items)


_ORIGIN = {
    "dataset": "Data set", "modality": "Modality", "protocol": "Protocol", "mapping": "Mapping", "model": "Models",
    "engine": "Engine", "dtype": "Weights",
}  # fmt: skip


def _range(values: Any) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def _training(law: Any) -> Section:
    seeds = law.cells["seed"].nunique() if "seed" in law.cells.columns else None
    said = "not recorded in the rows; to be stated by who trained the models"
    items = [
        ("Seeds", f"{seeds} in the table" if seeds else "not recorded in the rows"),
        ("Training data, repetition, hyperparameters, schedule", said),
        ("Cells of one run", "several steps of one run are cells of their own" + _RUNS[law.method.random]),
    ]
    return Section("Training", items)


_RUNS = {None: ", taken for independent", "run": "; what a run's cells share is a random effect"}


def _fit(law: Any) -> Section:
    loss, q = law.method.loss, len(law.form.nonlinear)
    threshold = ""
    if loss.huber:
        threshold = f", threshold {loss.delta:g}" if loss.delta else ", threshold 1.345 robust standard deviations"
    ranges = ", ".join(f"{one.name} {one.range[0]:g} to {one.range[1]:g}" for one in law.form.nonlinear)
    scaled = " (in units of the geometric mean)" if any(one.kind != "exponent" for one in law.form.nonlinear) else ""
    again = f", then from the {N_STARTS} lowest of the grid's minima" if q > 2 or loss.delta else ""
    items = [
        ("Minimised", f"{law.method.describe()}{threshold}; the sum over the cells"),
        ("Algorithm", "variable projection: coefficients solved exactly for every value of the nonlinear parameters"),
        ("Starts", f"all points of a grid of {' x '.join([str(N_GRID[q])] * q)}{again}; {ranges}{scaled}"),
        ("Polish", "scipy.optimize.least_squares, trust region, tolerance 1e-13 of the parameters"),
        ("Intervals", f"profile likelihood at {100 * law.level:g} %, F quantile with {law.dof} degrees of freedom"),
    ]
    if law.method.random:
        items.append(("Variance of runs over cells", number(law.run_variance)))
    return Section("Fit", items)


def _result(law: Any) -> Section:
    head = ["", "value", f"{100 * law.level:g} % interval"]
    body = [[key, number(value), span(law.ci[key])] for key, value in law.values.items()]
    criteria = f"AIC {law.aic:.1f}, AICc {law.aicc:.1f}, BIC {law.bic:.1f}"
    items = [
        ("Errors", f"R^2 {law.r2:.3f}, rms {law.rmse:.4f}, largest {np.abs(law.residuals).max():.4f}"),
        ("Criteria", criteria),
        ("Not supported by these data", " ".join([*law.warnings, *law.bounds]) or "nothing to report"),
    ]
    return Section("Result", items, (head, body))


def _held_out(law: Any) -> list[Section]:
    sections = []
    for axis in law.axes:
        try:
            found = law.holdout(axis.name)
        except Error as error:
            sections.append(Section(f"Hold-out by {axis.name}", [("Not possible", str(error))]))
            continue
        inside = f"{int(found.table['inside'].sum())} of {len(found.table)}"
        level = f"{100 * law.level:g} % predictive interval"
        items = [
            ("Predicted", f"each {axis.one} after the third from all before it; {len(found.table)} cells"),
            ("Errors", f"rms {found.rmse:.4f}; {inside} inside the {level}"),
        ]
        head, body = found.texts()
        sections.append(Section(f"Hold-out by {axis.name}", items, (head[1:], [row[1:] for row in body])))
    return sections


def _software() -> Section:
    try:
        version = metadata.version("llmcomp")
    except metadata.PackageNotFoundError:
        version = "not installed"
    return Section("Software", [("Versions", f"llmcomp {version}, SciPy {scipy.__version__}, NumPy {np.__version__}")])


def _markdown(title: str, sections: list[Section]) -> str:
    lines = [f"# {title}"]
    for section in sections:
        lines += ["", f"## {section.title}", ""]
        lines += [f"- {label}: {_plain_stars(text)}" for label, text in section.items]
        if section.table:
            lines += ["", markdown_table(*section.table)]
    return "\n".join(lines) + "\n"


def _plain_stars(text: str) -> str:
    return text.replace("*", r"\*")


def _latex(title: str, sections: list[Section]) -> str:
    lines = [rf"\section*{{{tex_text(title)}}}"]
    for section in sections:
        lines += [rf"\subsection*{{{tex_text(section.title)}}}", r"\begin{itemize}"]
        lines += [rf"\item {tex_text(label)}: {tex_text(text)}" for label, text in section.items]
        lines.append(r"\end{itemize}")
        if section.table:
            head, body = section.table
            lines.append(latex_table([tex_text(t) for t in head], [[tex_text(t) for t in row] for row in body]))
    return "\n".join(lines) + "\n"
