"""What is to be known of a tokenizer before its numbers are believed: its kind, what of it is left out, its start
token, and how much of real text it cuts as the model was trained. Nothing here is needed to code anything."""

from __future__ import annotations

import difflib
from typing import NamedTuple

from llmcomp import pico
from llmcomp.data.mappings import get_mapping
from llmcomp.data.tokenizers import ByteTokenizer, Tokenizer

_CHUNK_CHARACTERS = 2048
_SAMPLE_CHARACTERS = 1 << 15


class TokenizerReport(NamedTuple):
    """`kind`: in words. `left_out`: steps of the normaliser that are not applied. `start`: the start token and why.
    `stand_ins`: the bytes that others' tokens stand in for. `prefix`: what is put before text in training.
    `share_as_trained`: of the library's own tokens of a sample, in chunks of 2,048 characters, those that mapping
    `bytes` has too; `n_tokens`: how many tokens the sample has there, of `n_bytes` bytes."""

    kind: str
    vocab_size: int
    left_out: tuple[str, ...]
    start: str
    stand_ins: bytes
    prefix: bytes
    n_bytes: int
    n_tokens: int
    share_as_trained: float

    def lines(self) -> list[str]:
        """For people."""
        found = [f"tokenizer: {self.kind}, {self.vocab_size:,} tokens", f"start token: {self.start}"]
        if self.left_out:
            found.append(f"normaliser left out, since it changes the text: {', '.join(self.left_out)}")
        if self.stand_ins:
            found.append(f"bytes without a token, which others stand in for: {self.stand_ins.hex(' ')}")
        if self.prefix:
            found.append("a space stands before text, as in training; one side bit says where")
        per_token = self.n_bytes / self.n_tokens if self.n_tokens else 0.0
        found.append(
            f"sample text: {per_token:.2f} bytes a token, {self.share_as_trained:.2%} of the tokens as in training"
        )
        return found


def report(tokenizer: Tokenizer | ByteTokenizer, text: str | None = None) -> TokenizerReport:
    """Of `text`; None: the first 32,768 characters of the bundled sample."""
    if text is None:
        text = pico.sample_path("text").read_text("utf-8")[:_SAMPLE_CHARACTERS]
    mapping = get_mapping("bytes")
    n_tokens = n_expected = n_same = 0
    for at in range(0, len(text), _CHUNK_CHARACTERS):
        chunk = text[at : at + _CHUNK_CHARACTERS]
        found = mapping.encode(chunk.encode(), tokenizer).tokens.tolist()
        expected = tokenizer.encode_text(chunk).tolist()
        n_tokens += len(found)
        n_expected += len(expected)
        n_same += len(found) if found == expected else _n_common(found, expected)
    return TokenizerReport(
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        left_out=tokenizer.left_out,
        start=tokenizer.bos_reason,
        stand_ins=bytes(byte for byte in range(256) if tokenizer.needs_stand_ins(bytes([byte]))),
        prefix=tokenizer.prefix,
        n_bytes=len(text.encode()),
        n_tokens=n_tokens,
        share_as_trained=n_same / n_expected if n_expected else 1.0,
    )


def _n_common(found: list[int], expected: list[int]) -> int:
    matcher = difflib.SequenceMatcher(None, found, expected, autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks())
