"""The one family of errors that llmcomp raises for a user's mistake or a broken file, and how their messages show what
came from outside: on one line, not too long, without characters that a terminal obeys. Nothing else lives here."""

from __future__ import annotations

from typing import Any

_SHOWN_CHARACTERS = 80
_REASON_CHARACTERS = 300


class Error(ValueError):
    """What was asked for cannot be done; the message names the thing, what was found and what was expected."""


class CorruptArchive(Error):
    """An archive is damaged, cut short or not an archive at all; no byte of it was passed on."""


class ModelMismatch(Error):
    """The model at hand is not the one that the data were coded with."""


class DatasetError(Error):
    """A data set is missing, incomplete, has a wrong checksum or is too short."""


def named(name: Any) -> str:
    """A name from a file as a message shows it: as it is, where that is short and printable."""
    return name if isinstance(name, str) and name.isprintable() and 0 < len(name) <= _SHOWN_CHARACTERS else shown(name)


def printable(text: str) -> str:
    """Lines with names from files as a terminal may show them: control characters as their escapes."""
    return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in text.split("\n"))


def shown(value: Any) -> str:
    """A value from a file as a message shows it: its representation, shortened."""
    if isinstance(value, (str, bytes)):
        value = value[:_SHOWN_CHARACTERS]
    try:
        text = repr(value)
    except (ValueError, RecursionError, MemoryError):  # an int of more digits than Python writes
        return f"of type {type(value).__name__}"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def reason(error: BaseException) -> str:
    """What another library's exception says: its first line, shortened."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:_REASON_CHARACTERS]
    return "".join(character if character.isprintable() else "?" for character in text)
