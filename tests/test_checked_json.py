"""The boundary for JSON from outside: limits, and members that are what they must be or an Error that says what is."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from llmcomp.checked_json import Members, is_file_name, parse_object, read_bytes, read_object
from llmcomp.errors import Error, named, reason, shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b"\xff{}", "no valid JSON: 'utf-8' codec"),
        (b"\xff\xfe{\0}\0", "no valid JSON"),
        (b"[" * 1_000_000, "nested too deep or too large"),
        (b'{"a":' * 70 + b"{}" + b"}" * 70, "nested more than 64 deep"),
        (b'{"a": 1, "a": 1}', "a name occurs twice"),
        (b'{"a": {"b": [{"c": 1, "c": 2}]}}', "a name occurs twice"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"\\uDFFF": 1}', "surrogates not allowed"),
    ],
)
def test_text_that_is_no_object_of_values(content: bytes, message: str) -> None:
    with pytest.raises(Error, match=message) as raised:
        parse_object(content, "file.json")
    assert str(raised.value).startswith("file.json: ")
    assert "\n" not in str(raised.value)


def test_what_stands_in_an_object_comes_back() -> None:
    content = {"a": [1, -1.5, "\U0001f600", True, None, {"b": {}}], "é": 2**63 - 1, "least": -(2**63)}
    for ensure_ascii in (True, False):
        assert parse_object(json.dumps(content, ensure_ascii=ensure_ascii).encode(), "x") == content
    deepest = b'{"a":' * 64 + b"1" + b"}" * 64
    assert parse_object(deepest, "x") == json.loads(deepest)


@pytest.mark.parametrize("digits", ["9223372036854775808", "-9223372036854775809", "1" + "0" * 400, "9" * 100_000])
def test_numbers_beyond_64_bits_are_floats_that_no_reader_takes(digits: str) -> None:
    found = parse_object(f'{{"size": {digits}, "other": NaN, "last": -Infinity}}'.encode(), "config.json")
    assert found["size"] == float(digits) and type(found["size"]) is float
    with pytest.raises(Error, match=r"config.json: size is -?[0-9.einf+]+, expected a whole number"):
        Members(found, "config.json").integer("size")
    for name in ("other", "last"):
        with pytest.raises(Error, match=f"{name} is (nan|-inf), expected a number"):
            Members(found, "config.json").number(name)


def test_members_name_the_key_what_was_found_and_what_was_expected() -> None:
    members = Members({"n": 3, "x": 0.5, "yes": True, "s": "a", "list": [1, 2], "o": {"m": 1}, "null": None}, "f")
    assert (members.integer("n"), members.number("n"), members.number("x"), members.text("s")) == (3, 3.0, 0.5, "a")
    assert members.flag("yes") and members.array("list") == [1, 2] and members.sizes("list") == [1, 2]
    assert members.members("o").integer("m") == 1
    assert members.integer("missing", 7) == 7 and members.flag("missing", False) is False
    wrong: list[tuple[Any, str]] = [
        (lambda: members.integer("x"), "f: x is 0.5, expected a whole number up to 2147483647"),
        (lambda: members.integer("yes"), "f: yes is True, expected a whole number up to 2147483647"),
        (lambda: members.integer("n", lowest=4, highest=9), "f: n is 3, expected a whole number from 4 to 9"),
        (lambda: members.integer("n", lowest=1, highest=2), "f: n is 3, expected a positive integer up to 2"),
        (lambda: members.integer("nowhere"), "f: nowhere is missing, expected a value"),
        (lambda: members.number("yes"), "f: yes is True, expected a number"),
        (lambda: members.flag("n"), "f: n is 3, expected true or false"),
        (lambda: members.flag("null", True), "f: null is None, expected true or false"),
        (lambda: members.text("n"), "f: n is 3, expected a string"),
        (lambda: members.text("s", among=("b", "c")), "f: s is 'a', expected one of b, c"),
        (lambda: members.array("s"), "f: s is 'a', expected an array"),
        (lambda: members.object("list"), "f: list is [1, 2], expected an object"),
        (lambda: members.members("o").text("m"), "f: o: m is 1, expected a string"),
        (lambda: Members({"a": [1, -1]}, "f").sizes("a"), "f: a is [1, -1], expected an array of whole numbers"),
        (lambda: Members({"a": [2**63]}, "f").sizes("a"), f"f: a is [{2**63}], expected an array of whole numbers"),
        (lambda: Members({"a": 10**5000}, "f").number("a"), "f: a is of type int, expected a number"),
    ]
    for ask, message in wrong:
        with pytest.raises(Error) as raised:
            ask()
        assert str(raised.value) == message


def test_messages_stay_on_one_short_line_whatever_a_file_holds() -> None:
    for value in ("a\nb", "\x1b[2J", "x" * 10_000, "", "\u202ebc", ["y" * 5_000], b"z" * 500, 10**5000):
        for text in (named(value), shown(value)):
            assert 0 < len(text) <= 80 and text.isprintable()
    assert named("gpt_neox.layers.0") == "gpt_neox.layers.0"
    assert reason(ValueError("first\x1b line\nsecond")) == "first? line"
    assert reason(KeyError()) == "KeyError"
    assert len(reason(ValueError("x" * 10_000))) == 300


def test_only_regular_files_of_a_limited_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": 1}')
    assert read_object(path) == {"a": 1}
    with pytest.raises(Error, match=r"config.json: found 8 bytes, expected at most 7"):
        read_object(path, 7)
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(Error, match="expected a regular file"):
            read_bytes(tmp_path / name, 100)
    for name, message in (("nowhere", "No such file"), ("x" * 300, "File name too long"), ("a\0b", "null byte")):
        with pytest.raises(Error, match=message):
            read_object(tmp_path / name)


def test_names_of_files_lead_nowhere_else() -> None:
    assert all(map(is_file_name, ("model-00001-of-00002.safetensors", "a b", "文" * 85, "..a")))
    others = [
        "",
        ".",
        "..",
        "a/b",
        "../a",
        "/a",
        "a\\b",
        "a\0b",
        "a\nb",
        "\ud800",
        "文" * 86,
        "x" * 256,
        None,
        1,
        ["a"],
    ]
    assert not any(map(is_file_name, [*others, None, 1, ["a"]]))


def test_infinity_is_no_number() -> None:
    assert math.isinf(parse_object(b'{"a": 1e999}', "f")["a"])
    with pytest.raises(Error, match="a is inf, expected a number"):
        Members({"a": math.inf}, "f").number("a")
