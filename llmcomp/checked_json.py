"""JSON that comes from outside (config.json, tokenizer.json, indices, headers, manifests), parsed once into checked
values: limits on size, depth and numbers, one value a name, and members that are what the reader expects.

Any room may use this; it knows no file's meaning. What is wrong is an `Error` of one line that names the file, the key,
what was found and what was expected.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from llmcomp.errors import Error, named, shown
from llmcomp.float_state import ieee_state

# Far above what is in use: configurations take kilobytes, tokenizers up to 35 MB, indices of shards up to 10 MB.
CONFIG_BYTES_MAX = 1 << 24
INDEX_BYTES_MAX = 1 << 26
TOKENIZER_BYTES_MAX = 1 << 28
DEPTH_MAX = 64
# Sizes above this fit no array of the core's.
SIZE_MAX = (1 << 31) - 1

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_REQUIRED: Final = object()


def read_object(path: str | os.PathLike[str], bytes_max: int = CONFIG_BYTES_MAX) -> dict[str, Any]:
    """The JSON object in a regular file of at most `bytes_max` bytes; `Error` for anything else."""
    return parse_object(read_bytes(path, bytes_max), str(path))


def read_bytes(path: str | os.PathLike[str], bytes_max: int) -> bytes:
    """The content of a regular file of at most `bytes_max` bytes; `Error` for anything else."""
    try:
        status = os.stat(path)  # noqa: PTH116 - any kind of path
        if not stat.S_ISREG(status.st_mode):
            raise Error(f"{path}: expected a regular file")
        with Path(path).open("rb") as file:
            content = file.read(bytes_max + 1)
    except OSError as error:
        raise Error(f"{path}: {error.strerror or error}") from error
    except Error:
        raise
    except ValueError as error:  # a NUL, or a surrogate that stands for no byte, in the path
        raise Error(f"{shown(os.fspath(path))}: no path: {error}") from None
    if len(content) > bytes_max:
        raise Error(f"{path}: found {max(status.st_size, len(content)):,} bytes, expected at most {bytes_max:,}")
    return content


@ieee_state()
def parse_object(content: bytes, origin: str, what: str = "") -> dict[str, Any]:
    """The JSON object that UTF-8 text holds; `what` names it in messages where it is a part of `origin`.

    Numbers beyond 64 bits become floats (infinite beyond binary64), so that nothing fails on a key that nobody reads.
    `Error` for text that is not JSON or no object, for objects and arrays nested more than DEPTH_MAX deep, for a name
    that occurs twice in an object, and for strings that are no Unicode text (lone surrogates).
    """
    prefix = f"{origin}: {what + ' is ' if what else ''}"
    try:
        text = content.decode()
        found = json.loads(text, object_pairs_hook=_without_doubles, parse_int=_number)
        _check_depth(found)
        if _SURROGATE.search(content):
            json.dumps(found, ensure_ascii=False).encode()
    except (RecursionError, MemoryError) as error:
        raise Error(f"{prefix}no valid JSON: nested too deep or too large ({type(error).__name__})") from None
    except ValueError as error:
        raise Error(f"{prefix}no valid JSON: {error}") from None
    if not isinstance(found, dict):
        expected = "no JSON object:" if what else "expected a JSON object,"
        raise Error(f"{prefix}{expected} found {type(found).__name__}")
    return found


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _number(digits: str) -> int | float:
    # 20 characters: a sign and the 19 digits of 2^63.
    value = int(digits) if len(digits) <= 20 else 1 << 64
    return value if -(1 << 63) <= value < 1 << 63 else float(digits)


def _check_depth(found: Any) -> None:
    level = [found]
    for _ in range(DEPTH_MAX + 1):
        below = []
        for value in level:
            if isinstance(value, dict):
                below += [member for member in value.values() if isinstance(member, (dict, list))]
            elif isinstance(value, list):
                below += [member for member in value if isinstance(member, (dict, list))]
        if not below:
            return
        level = below
    raise ValueError(f"nested more than {DEPTH_MAX} deep")


def finite_number(value: Any) -> float | None:
    """A finite number as a float; None for anything else, booleans and integers beyond binary64 among them."""
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    return None


class Members:
    """The members of an object of `origin`, each asked for as what it must be.

    Methods return `default` where the member is missing, or raise `Error` if none is given. null is a value.
    """

    def __init__(self, members: Mapping[str, Any], origin: str) -> None:
        self._members, self._origin = members, origin

    def __contains__(self, key: str) -> bool:
        return key in self._members

    def error(self, key: str, expected: str) -> Error:
        """The `Error` of a member that is not as expected, to be raised."""
        if key not in self._members:
            return Error(f"{self._origin}: {named(key)} is missing, expected {expected}")
        return Error(f"{self._origin}: {named(key)} is {shown(self._members[key])}, expected {expected}")

    def integer(self, key: str, default: Any = _REQUIRED, *, lowest: int = 0, highest: int = SIZE_MAX) -> int:
        """A whole number from `lowest` to `highest`."""
        value = self._get(key, default)
        if type(value) is int and lowest <= value <= highest:
            return value
        if lowest == highest:
            raise self.error(key, str(lowest))
        kind = {0: "a whole number", 1: "a positive integer"}.get(lowest)
        raise self.error(key, f"{kind} up to {highest}" if kind else f"a whole number from {lowest} to {highest}")

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A finite number, as a float."""
        number = finite_number(self._get(key, default))
        if number is None:
            raise self.error(key, "a number")
        return number

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        """true or false."""
        value = self._get(key, default)
        if isinstance(value, bool):
            return value
        raise self.error(key, "true or false")

    def text(self, key: str, default: Any = _REQUIRED, *, among: Sequence[str] = ()) -> str:
        """A string, one of `among` if that is given."""
        value = self._get(key, default)
        if isinstance(value, str) and (not among or value in among):
            return value
        raise self.error(key, f"one of {', '.join(among)}" if among else "a string")

    def array(self, key: str, default: Any = _REQUIRED) -> Sequence[Any]:
        """An array of anything."""
        value = self._get(key, default)
        if isinstance(value, (list, tuple)):
            return value
        raise self.error(key, "an array")

    def object(self, key: str, default: Any = _REQUIRED) -> Mapping[str, Any]:
        """An object of anything."""
        value = self._get(key, default)
        if isinstance(value, Mapping):
            return value
        raise self.error(key, "an object")

    def members(self, key: str, default: Any = _REQUIRED) -> Members:
        """The members of an object in this one."""
        return Members(self.object(key, default), f"{self._origin}: {named(key)}")

    def sizes(self, key: str, *, highest: int = (1 << 63) - 1) -> list[int]:
        """An array of whole numbers."""
        value = self._get(key, _REQUIRED)
        if isinstance(value, list) and all(type(size) is int and 0 <= size <= highest for size in value):
            return value
        raise self.error(key, "an array of whole numbers")

    def _get(self, key: str, default: Any) -> Any:
        if key in self._members:
            return self._members[key]
        if default is _REQUIRED:
            raise self.error(key, "a value")
        return default


def is_file_name(value: Any) -> bool:
    """Whether `value` names a file of a folder, and nothing outside it."""
    if not isinstance(value, str) or value in ("", ".", "..") or "/" in value or "\\" in value:
        return False
    return value.isprintable() and len(value.encode("utf-8", "surrogatepass")) <= 255
