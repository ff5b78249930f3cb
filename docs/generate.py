"""The pages that follow from the package itself: reference of the public names, command line, a page for each suite,
and the figures' files that other pages show. Called by conf.py; the folder _generated is never committed.
"""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import llmcomp
from llmcomp.cli.main import _parser
from llmcomp.models.suite import Suite, SuiteModel, bundled_suites, load_suite

# What the reference shows, by the question that brings a reader to it; `test_docs` holds it against `__all__`.
REFERENCE = {
    "Compress and decompress": ["compress", "decompress", "open", "generate"],
    "Models": ["load_model", "list_models"],
    "The coder": [
        *("intervals", "code_length", "encode", "decode", "encode_intervals", "Encoder", "Decoder"),
        *("backends", "use_backend", "use_threads"),
    ],
    "Data, scores and sweeps": ["load_dataset", "score", "sweep", "published", "read_rows", "bits_by_position"],
    "Scaling laws": ["fit_scaling_law", "compare_forms", "fit_joint", "compare_shares", "plot_all"],
    "Claims": ["compare", "verify"],
    "Errors": ["Error", "CorruptArchive", "ModelMismatch", "DatasetError"],
}
OTHERS = "Others"
_SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:")


def write(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "suites").mkdir(parents=True)
    pages = {"python.md": python_page(), "cli.md": cli_page(), "suites/index.md": suites_page()}
    pages |= {f"suites/{name}.md": suite_page(load_suite(name)) for name in bundled_suites()}
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")


# Reference.


def reference_names() -> dict[str, list[str]]:
    """REFERENCE without what this version does not have, and under OTHERS what it has beside."""
    known = {*llmcomp.__all__, "open"}
    found = {title: [name for name in names if name in known] for title, names in REFERENCE.items()}
    rest = sorted(known - {name for names in found.values() for name in names})
    return {**found, OTHERS: rest} if rest else found


def python_page() -> str:
    parts = ["# Python", "The public names of `import llmcomp`. Shapes are in brackets; errors are `llmcomp.Error`."]
    for title, names in reference_names().items():
        parts.append(f"## {title}")
        for name in names:
            parts += object_parts(name, getattr(llmcomp, name))
    return "\n\n".join(parts) + "\n"


def object_parts(name: str, value: Any) -> list[str]:
    parts = [f"### {name}", f"```python\n{signature(name, value)}\n```", prose(inspect.getdoc(value) or "")]
    if inspect.isclass(value) and not issubclass(value, Exception):
        for member, method in sorted(vars(value).items()):
            if not member.startswith("_") and (text := inspect.getdoc(method)):
                shown = signature(member, method) if callable(method) else member
                parts.append(f"`.{' '.join(shown.split())}`\n: {prose(text).replace(chr(10), chr(10) + '  ')}")
    return parts


class _Plain(str):
    """An annotation as it stands in the source."""

    __repr__ = str.__str__


def signature(name: str, value: Any) -> str:
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    parameters = [one.replace(annotation=plain(one.annotation)) for one in found.parameters.values()]
    text = str(found.replace(parameters=parameters, return_annotation=plain(found.return_annotation)))
    if len(name + text) > 100:
        pieces = [str(one) for one in parameters]
        stars = [i for i, one in enumerate(parameters) if one.kind == one.KEYWORD_ONLY]
        if stars and not any(one.kind == one.VAR_POSITIONAL for one in parameters):
            pieces.insert(stars[0], "*")
        result = text.rpartition(") -> ")[2]
        text = "(\n    " + ",\n    ".join(pieces) + f",\n) -> {result}"
    return name + text


def plain(annotation: Any) -> Any:
    if annotation is inspect.Signature.empty:
        return annotation
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return _Plain(re.sub(r"(typing|collections\.abc|llmcomp(\.\w+)*|numpy)\.", "", text))


def prose(docstring: str) -> str:
    """Markdown of a docstring: paragraphs, "Args:" and its like as lists, indented blocks as paragraphs."""
    lines, parts = docstring.splitlines(), []
    for block in re.split(r"\n\s*\n", "\n".join(lines)):
        rows = block.splitlines()
        while rows:
            if rows[0].strip() in _SECTIONS:
                parts.append(f"**{rows.pop(0).strip()[:-1]}**")
                parts.append(listed(rows))
                rows = []
            else:
                parts.append(listed(rows) if any(row.startswith("  ") for row in rows[1:]) else paragraph(rows))
                rows = []
    return "\n\n".join(part for part in parts if part)


def listed(rows: list[str]) -> str:
    """Rows at the least indentation begin items; what is indented further goes on with one."""
    margin = min((len(row) - len(row.lstrip()) for row in rows if row.strip()), default=0)
    items: list[list[str]] = []
    for row in rows:
        if len(row) - len(row.lstrip()) == margin or not items:
            items.append([])
        items[-1].append(row)
    if any(not re.match(r"[\w`, *.]+:( |$)", item[0].strip()) for item in items):
        return joined(rows)
    return "\n".join(f"- {joined(item)}" for item in items)


def paragraph(rows: list[str]) -> str:
    """A paragraph that explains two arguments or more, "`a`: this. `b`, `c`: that.", is a list of them."""
    items = re.split(r"(?<=\.) (?=`\w+`(?:, `\w+`)*:)", " ".join(row.strip() for row in rows))
    if len(items) < 2 or not re.match(r"`\w+`(, `\w+`)*:", items[0]):
        return joined(rows)
    return "\n".join(f"- {joined([item])}" for item in items)


def joined(rows: list[str]) -> str:
    text = " ".join(row.strip() for row in rows)
    pieces = re.split(r"(``.*?``|`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else re.sub(r"([*<>$\[\]|])", r"\\\1", piece) for piece in pieces)


# Command line.


def cli_page() -> str:
    parts = [
        "# Command line",
        "Exit status 0: done. 1: failed, and one line on standard error says what and what to do. 2: usage, or a file "
        "was skipped. 3: parts of a salvaged archive are lost. `-q` silences, `--json` prints for programs. Settings: "
        "`LLMCOMP_BACKEND`, `LLMCOMP_THREADS`, `LLMCOMP_CACHE`.",
    ]
    for name, parser in subcommands(_parser()):
        parts += [f"## llmcomp {name}", f"```text\n{parser.format_help().strip()}\n```"]
        for action, below in subcommands(parser):
            parts += [f"### llmcomp {name} {action}", f"```text\n{below.format_help().strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def subcommands(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return list(action.choices.items())
    return []


# Suites.


def suites_page() -> str:
    rows = ["# Suites", "What `--suite` knows: models with their checkpoints, facts without code."]
    table = ["| suite | models | parameters | checkpoints |", "|---|---|---|---|"]
    for name in bundled_suites():
        suite = load_suite(name)
        counts = [model.n_params or model.params or 0 for model in suite.models]
        span = f"{amount(min(counts))} to {amount(max(counts))}"
        listed_steps = sum(len(steps_of(model)) for model in suite.models)
        table.append(
            f"| [{suite.title or name}]({name}.md) | {len(suite.models)} | {span} | {listed_steps or 'on the hub'} |"
        )
    toctree = ["```{toctree}", ":hidden:", "", *bundled_suites(), "```"]
    return "\n\n".join([*rows, "\n".join(table), "\n".join(toctree)]) + "\n"


def suite_page(suite: Suite) -> str:
    first = suite.models[0]
    facts = [
        ("suite", f"`{suite.name}`"),
        ("family", f"`{first.family}`"),
        ("licence", first.licence),
        ("data", first.data),
    ]
    parts = [f"# {suite.title or suite.name}"]
    parts.append("\n".join(["| | |", "|---|---|", *(f"| {key} | {cell(value)} |" for key, value in facts if value)]))
    parts.append(f"```sh\nllmcomp sweep --suite {suite.name} --dry-run\n```")
    table = ["| model | parameters | without embeddings | checkpoints |", "|---|---|---|---|"]
    for model in suite.models:
        counts = [f"{count:,}" if count else "" for count in (model.n_params, model.n_params_nonembedding)]
        table.append(f"| `{model.name}` | {counts[0]} | {counts[1]} | {steps_text(model)} |")
    parts += ["## Models", "\n".join(table)]
    for name, grid in suite.grids.items():
        wanted = "; ".join(f"{key}: {', '.join(map(str, v)) if isinstance(v, list) else v}" for key, v in grid.items())
        parts.append(f"Grid `{name}`: {cell(wanted)}.")
    for title, lines in (("Sources", suite.sources), ("Not certain, so the hub is asked", suite.uncertain)):
        if lines:
            parts += [f"## {title}", "\n".join(f"- {cell(line)}" for line in lines)]
    return "\n\n".join(parts) + "\n"


def steps_of(model: SuiteModel) -> list[int]:
    return sorted({step for rule in model.rules for step in rule.steps or () if step is not None})


def steps_text(model: SuiteModel) -> str:
    steps = steps_of(model)
    if not steps:
        return "on the hub"
    return f"{len(steps)}: {steps[0]:,} to {steps[-1]:,}" if len(steps) > 1 else f"step {steps[0]:,}"


def amount(n: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return str(n)


def cell(text: object) -> str:
    """Text for a table: no bars, links as links, no emphasis by chance; code stays as it is."""

    def escaped(words: str) -> str:
        words = re.sub(r"([*_|<>])", r"\\\1", words)
        return re.sub(r"https?://[^\s,;)]+", lambda found: f"<{found[0].replace(chr(92), '')}>", words)

    return "".join(part if part.startswith("`") else escaped(part) for part in re.split(r"(`[^`]*`)", str(text)))
