"""How laws are written: numbers, intervals, tables as plain text, Markdown, HTML and LaTeX. Knows no law."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

Interval = tuple[float, float]
Table = Sequence[Sequence[str]]

_TEX = {"alpha": r"$\alpha$", "beta": r"$\beta$", "gamma": r"$\gamma$", "tau": r"$\tau$", "break": "break"}


def number(value: float) -> str:
    return f"{value:.4g}"


def short_number(value: float) -> str:
    """1400000000 -> 1.4B, 13000 -> 13k, 2048 -> 2,048."""
    if 1e3 <= value < 1e4 and value % 100:
        return f"{value:,.0f}"
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"


def span(interval: Interval) -> str:
    low, high = interval
    if math.isinf(low) or math.isinf(high):
        if math.isinf(low) and math.isinf(high):
            return "any"
        return f"below {high:.4g}" if math.isinf(low) else f"above {low:.4g}"
    return f"{low:.4g} to {high:.4g}"


def align(table: Table) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def html_table(head: Sequence[str], body: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows = "".join(row(cells, "td") for cells in body)
    return f"<table><thead>{row(head, 'th')}</thead><tbody>{rows}</tbody></table>"


def markdown_table(head: Sequence[str], body: Table) -> str:
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in (head, *body)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def tex_name(name: str) -> str:
    """A parameter as LaTeX writes it."""
    return _TEX.get(name, f"${name}$")


def tex_number(value: float) -> str:
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    return f"${mantissa} \\times 10^{{{int(exponent)}}}$" if exponent else f"${mantissa}$"


def tex_span(interval: Interval) -> str:
    low, high = interval
    if math.isinf(low) or math.isinf(high):
        if math.isinf(low) and math.isinf(high):
            return "any"
        return f"$<$ {tex_number(high)}" if math.isinf(low) else f"$>$ {tex_number(low)}"
    return f"{tex_number(low)} to {tex_number(high)}"


def tex_text(text: str) -> str:
    """Plain text with LaTeX's own characters escaped."""
    special = {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}", "<": "$<$", ">": "$>$", "|": "$|$"}
    special |= {char: "\\" + char for char in "_%&#${}"}
    return "".join(special.get(char, char) for char in text)


def latex_table(head: Sequence[str], body: Table, columns: str | None = None) -> str:
    """A tabular that needs no package; the cells are LaTeX already."""
    lines = [" & ".join(row) + r" \\" for row in (head, *body)]
    spec = columns or "l" + "r" * (len(head) - 1)
    return "\n".join(
        [rf"\begin{{tabular}}{{{spec}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", r"\end{tabular}"]
    )
