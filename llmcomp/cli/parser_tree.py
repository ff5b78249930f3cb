"""The commands of a parser as data, for what is made of them: completion and the man page."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple


class Option(NamedTuple):
    """`names`: none for a positional one. `takes_value`, `choices`: of what may follow it."""

    names: tuple[str, ...]
    metavar: str
    takes_value: bool
    choices: tuple[str, ...]
    help: str


class Command(NamedTuple):
    """`words`: how it is called, without the program's name; `subcommands` with their help."""

    words: tuple[str, ...]
    description: str
    options: tuple[Option, ...]
    subcommands: tuple[tuple[str, str], ...]


def commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[Command]:
    """The program itself and every command below it."""
    options, below, subcommands = [], [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            subcommands += [(name, helps.get(name, "")) for name in action.choices]
            below += list(action.choices.items())
        elif action.help != argparse.SUPPRESS:
            options.append(_option(action, parser))
    yield Command(words, parser.description or "", tuple(options), tuple(subcommands))
    for name, subparser in below:
        yield from commands(subparser, (*words, name))


def _option(action: argparse.Action, parser: argparse.ArgumentParser) -> Option:
    takes_value = action.nargs != 0
    choices = tuple(map(str, action.choices or ())) if takes_value else ()
    metavar = action.metavar or ("|".join(choices) if choices else action.dest.upper())
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return Option(tuple(action.option_strings), str(metavar), takes_value, choices, text)
