"""Which token stands before the first one: what the files of a tokenizer say, and what stands in where they do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

_NAMES = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>")


class StartHints(NamedTuple):
    """What the files beside a tokenizer.json say: tokens' texts from tokenizer_config.json, ids from config.json."""

    bos: str | None = None
    eos: str | None = None
    bos_id: int | None = None
    eos_id: int | None = None


def find_start_token(
    content: Mapping[str, Any], ids: Mapping[str, int], special: set[int], hints: StartHints
) -> tuple[int | None, str]:
    """(id, why), of the parsed tokenizer.json, {text: id} of all tokens and the special tokens' ids.

    None where no token can be distinguished from text; the caller's 0 stands in then. An id of config.json counts only
    if it is that of a special token: configurations have defaults that mean nothing.
    """
    first = _template_start(content.get("post_processor"))
    bos, eos = hints.bos or "", hints.eos or ""
    if first in ids:
        return ids[first], f"{first}, which tokenizer.json puts before every text"
    if bos in ids:
        return ids[bos], f"{bos}, bos_token of tokenizer_config.json"
    if name := next((name for name in _NAMES if name in ids), None):
        return ids[name], f"{name}, by its name: the tokenizer's files name no start token"
    texts = {token: text for text, token in ids.items()}
    if hints.bos_id in special:
        return hints.bos_id, f"{texts[hints.bos_id]}, bos_token_id of config.json"
    if eos in ids:
        return ids[eos], f"{eos} stands in, the end token: the model has no start token"
    if hints.eos_id in special:
        return hints.eos_id, f"{texts[hints.eos_id]} stands in, the end token: the model has no start token"
    return None, "token 0 stands in: the tokenizer's files name neither a start nor an end token"


def _template_start(post_processor: Any) -> Any:
    """The special token that a template puts before a single text, or None."""
    if not isinstance(post_processor, dict):
        return None
    steps = post_processor.get("processors") if post_processor.get("type") == "Sequence" else [post_processor]
    for step in steps if isinstance(steps, list) else ():
        if not isinstance(step, dict) or step.get("type") != "TemplateProcessing":
            continue
        single = step.get("single")
        first = single[0] if isinstance(single, list) and single else None
        special = first.get("SpecialToken") if isinstance(first, dict) else None
        name = special.get("id") if isinstance(special, dict) else None
        if isinstance(name, str):
            return name
    return None
