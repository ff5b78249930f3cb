"""A tokenizer.json: checked, of which kind it is, its fingerprint, and the library's tokenizers made of it.

Two kinds are known: BPE over bytes (GPT-2's scheme), and BPE over characters with byte fallback (SentencePiece's, as
Llama 2, Mistral and Gemma have it). Anything else is refused by name. Nothing here encodes or decodes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import tokenizers

from llmcomp.checked_json import Members, parse_object
from llmcomp.errors import Error, named, reason, shown

_IDS_MAX = 1 << 24
_ADDED_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")
_WHY_REFUSED = {
    "Unigram": ": its pieces with probabilities are not known here",
    "WordPiece": ": it drops spaces, which no decoder brings back",
    "WordLevel": ": it has whole words only, and no tokens for other bytes",
}
PREFIX_ALWAYS, PREFIX_UNLESS_SPACE = "always", "unless space"


class Description(NamedTuple):
    """A tokenizer.json that is understood.

    `space`: the character that stands for a space in a vocabulary of characters; None: a space is itself.
    `prefix`: whether a space is put before every text in training ("always"), only before one that does not begin with
    a space ("unless space"), or never (None). `left_out`: the normaliser's steps that are not applied, since they
    change the text. `normalizer` and `pre_tokenizer` are what is applied, as the library writes them.
    """

    content: dict[str, Any]
    is_byte_level: bool
    vocab: dict[str, int]
    added: list[dict[str, Any]]
    space: str | None
    prefix: str | None
    left_out: tuple[str, ...]
    normalizer: list[dict[str, Any]]
    pre_tokenizer: list[dict[str, Any]]

    @property
    def kind(self) -> str:
        """In words."""
        return "BPE over bytes" if self.is_byte_level else "BPE over characters with byte fallback"


def parse(tokenizer_json: bytes, origin: str) -> Description:
    """The description in a tokenizer.json; `Error` for other kinds, and for a field of another type."""
    described = f"{origin}: not a Hugging Face tokenizer.json"
    content = parse_object(tokenizer_json, described)
    model = Members(content, described).members("model")
    # GPT-2's own file, of 2019, does not name the kind.
    kind = "BPE" if "type" not in model and "merges" in model else model.text("type")
    if kind != "BPE":
        raise Error(
            f"{origin}: the tokenizer's model is {named(kind)}, expected BPE over bytes or with byte fallback"
            f"{_WHY_REFUSED.get(kind, '')}"
        )
    _check_model(content["model"], model, origin)
    _check_added(content, origin)
    vocab, added = content["model"]["vocab"], content.get("added_tokens") or []
    pre_tokenizer = _steps(content, "pre_tokenizer", "pretokenizers", origin)
    normalizer = _steps(content, "normalizer", "normalizers", origin)
    if content["model"].get("byte_fallback"):
        return _with_byte_fallback(content, normalizer, pre_tokenizer, origin)
    types = [step["type"] for step in pre_tokenizer]
    if "ByteLevel" not in types:
        found = ", ".join(map(named, types)) or "none"
        raise Error(
            f"{origin}: the tokenizer's pre-tokenisers are {found}; expected ByteLevel among them, or a model with "
            "byte_fallback"
        )
    left_out = tuple(named(step["type"]) for step in normalizer)
    return Description(content, True, vocab, added, None, None, left_out, [], _without_prefix_space(pre_tokenizer))


def _check_model(model: Mapping[str, Any], members: Members, origin: str) -> None:
    vocab = members.object("vocab")
    entries = Members(vocab, f"{origin}: vocab")
    for entry in vocab:
        entries.integer(entry, highest=_IDS_MAX - 1)
    if not vocab or len(set(vocab.values())) != len(vocab):
        raise Error(f"{origin}: {len(vocab)} entries of vocab have {len(set(vocab.values()))} ids, expected one each")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if value := model.get(option):
            raise Error(f"{origin}: the tokenizer's BPE has {option} = {shown(value)}, expected none")
    for flag in ("ignore_merges", "byte_fallback"):
        if model.get(flag) is not None:
            members.flag(flag)
    for merge in members.array("merges"):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise Error(f"{origin}: merges has {shown(merge)}, expected pairs of strings")


def _check_added(content: dict[str, Any], origin: str) -> None:
    if content.get("added_tokens") is None:
        return
    for number, token in enumerate(Members(content, origin).array("added_tokens")):
        if not isinstance(token, dict):
            raise Error(f"{origin}: added_tokens has {shown(token)}, expected objects")
        members = Members(token, f"{origin}: added_tokens[{number}]")
        members.integer("id", highest=_IDS_MAX - 1)
        members.text("content")
        for flag in _ADDED_FLAGS:
            members.flag(flag, False)


def _steps(content: dict[str, Any], key: str, parts: str, origin: str) -> list[dict[str, Any]]:
    """The steps of a normaliser or pre-tokeniser."""
    if content.get(key) is None:
        return []
    first = Members(content, origin).members(key)
    steps = list(first.array(parts)) if first.text("type") == "Sequence" else [content[key]]
    for step in steps:
        if not isinstance(step, dict) or not isinstance(step.get("type"), str):
            raise Error(f"{origin}: {key} has {shown(step)}, expected an object with a type")
    return steps


def _without_prefix_space(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pre-tokeniser's steps; a space put before the text could not be told from one that was there."""
    found = [dict(step) for step in steps]
    for step in found:
        if step["type"] == "ByteLevel":
            step |= {"add_prefix_space": False, "trim_offsets": True, "use_regex": step.get("use_regex", True)}
    return found


def _with_byte_fallback(
    content: dict[str, Any], normalizer: list[dict[str, Any]], pre_tokenizer: list[dict[str, Any]], origin: str
) -> Description:
    vocab, added = content["model"]["vocab"], content.get("added_tokens") or []
    lacking = [entry for byte in range(256) if (entry := f"<0x{byte:02X}>") not in vocab]
    if lacking:
        raise Error(f"{origin}: the tokenizer's BPE has byte_fallback, and no token {lacking[0]} for that byte")
    spaces: set[Any] = set()
    prefix, left_out = None, []
    kept_normalizer, kept_pre_tokenizer = [], []
    for step in normalizer:
        if step["type"] == "Replace" and step.get("pattern") == {"String": " "}:
            spaces.add(step.get("content"))
            kept_normalizer.append(step)
        elif step["type"] == "Prepend":
            prefix = PREFIX_ALWAYS
            spaces.add(step.get("prepend"))
        else:
            left_out.append(named(step["type"]))
    for step in pre_tokenizer:
        if step["type"] != "Metaspace":
            kept_pre_tokenizer.append(step)
            continue
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        prefix = prefix or (None if scheme == "never" else PREFIX_UNLESS_SPACE)
        spaces.add(step.get("replacement"))
        split = {"split": step["split"]} if "split" in step else {}
        metaspace = {"type": "Metaspace", "replacement": step.get("replacement"), "prepend_scheme": "never"}
        kept_pre_tokenizer.append({**metaspace, **split})
    space = _one_space(spaces, origin)
    return Description(
        content, False, vocab, added, space, prefix, tuple(left_out), kept_normalizer, kept_pre_tokenizer
    )


def _one_space(spaces: set[Any], origin: str) -> str | None:
    if len(spaces) > 1 or not all(isinstance(space, str) and len(space) == 1 for space in spaces):
        raise Error(f"{origin}: spaces are written as {shown(sorted(map(str, spaces)))}, expected one character")
    return next(iter(spaces), None)


def fingerprint(description: Description) -> str:
    """SHA-256 (hex) of what decides the tokens, the same for files that differ only in how versions of the library
    write the same tokenizer; FORMAT.md 5.6 has the text that is hashed."""
    model = description.content["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    canonical: dict[str, Any] = {
        "model": {"vocab": description.vocab, "merges": merges, "ignore_merges": bool(model.get("ignore_merges"))},
        "pre_tokenizer": description.pre_tokenizer,
        "added_tokens": sorted(
            [token["id"], token["content"], *(bool(token.get(flag)) for flag in _ADDED_FLAGS)]
            for token in description.added
        ),
    }
    if not description.is_byte_level:
        steps = [step for step in description.pre_tokenizer if step["type"] != "Metaspace"]
        spaces = {"prefix": description.prefix, "space": description.space}
        canonical |= {"byte_fallback": spaces, "pre_tokenizer": steps}
    return hashlib.sha256(json.dumps(canonical, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def text_tokenizer(description: Description, origin: str) -> tokenizers.Tokenizer:
    """The library's tokenizer for stretches of text: no normaliser that changes it, no prefix space, special tokens are
    plain text."""
    changed = description.content | {
        "normalizer": {"type": "Sequence", "normalizers": description.normalizer} if description.normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": description.pre_tokenizer},
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    tokenizer = library_tokenizer(json.dumps(changed), origin)
    tokenizer.encode_special_tokens = True
    for token in description.added:
        found = tokenizer.token_to_id(token["content"])
        if found != token["id"]:
            raise Error(
                f"{origin}: added token {shown(token['content'])} has id {token['id']}, the library gives it {found}"
            )
    return tokenizer


def library_tokenizer(tokenizer_json: str, origin: str) -> tokenizers.Tokenizer:
    """The library's own tokenizer of a description; `Error` where it cannot read it."""
    with library_errors(origin):
        return tokenizers.Tokenizer.from_str(tokenizer_json)


@contextlib.contextmanager
def library_errors(origin: str) -> Iterator[None]:
    """The tokenizers library raises bare Exception for what it cannot read, and panics, which are no Exception."""
    try:
        yield
    except (Error, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise Error(f"{origin}: the tokenizers library cannot read it: {reason(error)}") from error
