"""The command `completion`: scripts for bash, zsh and fish, made of the parser, that complete commands and options.

They ask nothing when they run: no Python is started for a press of the tab key.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from llmcomp.cli.parser_tree import Command, Option

SHELLS = ("bash", "zsh", "fish")


def script(shell: str, program: str, commands: Sequence[Command]) -> str:
    """The script for one of SHELLS."""
    if shell == "fish":
        return _fish(program, commands)
    # zsh runs bash's by its own emulation.
    head = (
        "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    )
    return f"{head}{_bash(program, commands)}"


def _names(options: Iterable[Option]) -> list[str]:
    return [name for option in options for name in option.names]


# Long: a script of bash.
def _bash(program: str, commands: Sequence[Command]) -> str:
    """A word that begins with "-" is an option of the command so far; behind an option with choices comes one of them;
    else a subcommand, where there are any, or a file."""
    function = f"_{program}"
    known, values, files = [], [], []
    for command in commands:
        key = " ".join(command.words)
        words = [*_names(command.options), *(name for name, _ in command.subcommands)]
        known.append(f"        {shlex.quote(key)}) words={shlex.quote(' '.join(words))} ;;")
        if not command.subcommands:
            files.append(shlex.quote(key))
        for option in command.options:
            for name in option.names if option.takes_value else ():
                pattern = shlex.quote(f"{key} {name}".strip())
                values.append(f"        {pattern}) choices={shlex.quote(' '.join(option.choices) or '-')} ;;")
    below = [" ".join((*command.words, name)).strip() for command in commands for name, _ in command.subcommands]
    lines = [
        f"# llmcomp's completion, made by `{program} completion`.",
        f"{function}() {{",
        "    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]}",
        "    local command='' words='' choices='' i",
        "    COMPREPLY=()",
        "    for ((i = 1; i < COMP_CWORD; i++)); do",
        '        case "${command:+$command }${COMP_WORDS[i]}" in',
        f'        {"|".join(map(shlex.quote, below))}) command="${{command:+$command }}${{COMP_WORDS[i]}}" ;;',
        "        esac",
        "    done",
        '    case "$command" in',
        *known,
        "    esac",
        '    case "${command:+$command }$previous" in',
        *values,
        "    esac",
        '    if [[ -n $choices && $choices != "-" ]]; then',
        '        COMPREPLY=($(compgen -W "$choices" -- "$current"))',
        "    elif [[ -n $choices || ( $current != -* && -n $command ) ]]; then",
        '        case "$command" in',
        f'        {"|".join(files)}) COMPREPLY=($(compgen -f -- "$current")) ;;',
        '        *) COMPREPLY=($(compgen -W "$words" -- "$current")) ;;',
        "        esac",
        "    else",
        '        COMPREPLY=($(compgen -W "$words" -- "$current"))',
        "    fi",
        "}",
        f"complete -o filenames -F {function} {program}",
    ]
    return "\n".join(lines) + "\n"


def _fish(program: str, commands: Sequence[Command]) -> str:
    lines = [f"# llmcomp's completion, made by `{program} completion`."]
    for command in commands:
        below = [name for name, _ in command.subcommands]
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in command.words)
        none_below = f"not __fish_seen_subcommand_from {' '.join(below)}" if below else ""
        condition = "; and ".join(filter(None, [seen, none_below]))
        start = f"complete -c {program}" + (f" -n {shlex.quote(condition)}" if condition else "")
        lines += [f"{start} -f -a {name} -d {shlex.quote(text)}" for name, text in command.subcommands]
        for option in command.options:
            if not option.names:
                continue
            names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in option.names)
            value = f" -x -a {shlex.quote(' '.join(option.choices))}" if option.choices else " -r" * option.takes_value
            lines.append(f"{start} {names}{value} -d {shlex.quote(option.help)}")
    return "\n".join(lines) + "\n"
