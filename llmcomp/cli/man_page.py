"""llmcomp(1), made of the parser: `python -m llmcomp.cli.man_page FILE`, as `make man` does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llmcomp.cli.parser_tree import Command, Option
from llmcomp.version import __version__

_STATUS = (
    ("0", "done"),
    ("1", "failed: one line on standard error says what and what to do; a number that verify refuses"),
    ("2", "usage, and as gzip: a file skipped"),
    ("3", "parts of a salvaged archive are lost"),
)
_ENVIRONMENT = (
    ("LLMCOMP_BACKEND", "the backend of the coder and the exact engines: serial, avx2, avx512, neon"),
    ("LLMCOMP_THREADS", "how many threads they take"),
    ("LLMCOMP_CACHE", "the folder of data that were fetched"),
)


def man_page(program: str, commands: Sequence[Command]) -> str:
    """The page in the man macros."""
    first = commands[0]
    lines = [
        f'.TH {program.upper()} 1 "" "{program} {__version__}" "User commands"',
        ".SH NAME",
        f"{program} \\- compress with language models, and measure how well they do",
        ".SH SYNOPSIS",
        f".B {program}",
        "\\fICOMMAND\\fR [\\fIoptions\\fR]",
        ".SH DESCRIPTION",
        _text(first.description),
        ".SH OPTIONS",
        *_options(first.options),
        ".SH COMMANDS",
    ]
    for command in commands[1:]:
        lines += [
            f".SS {program} {_text(' '.join(command.words))}",
            _text(command.description),
            *_options(command.options),
        ]
    lines += [".SH EXIT STATUS", *_pairs(_STATUS), ".SH ENVIRONMENT", *_pairs(_ENVIRONMENT)]
    return "\n".join(lines) + "\n"


def _options(options: Sequence[Option]) -> list[str]:
    lines = []
    for option in options:
        value = f" \\fI{_text(option.metavar)}\\fR" if option.takes_value else ""
        names = ", ".join(f"\\fB{_text(name)}\\fR" for name in option.names)
        lines += [".TP", f"{names}{value}".strip(), _text(option.help)]
    return lines


def _pairs(pairs: Sequence[tuple[str, str]]) -> list[str]:
    return [line for name, text in pairs for line in (".TP", f"\\fB{_text(name)}\\fR", _text(text))]


def _text(text: str) -> str:
    """One line of text, with what roff would take for its own protected."""
    line = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{line}" if line.startswith((".", "'")) else line


def main() -> None:
    """Writes the page to the file that the command line names."""
    from llmcomp.cli.main import parser_tree

    Path(sys.argv[1]).write_text(man_page("llmcomp", parser_tree()), encoding="utf-8")


if __name__ == "__main__":
    main()
