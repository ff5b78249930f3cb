"""Other forms of tokenizers as tokenizer.json, by transformers (with tiktoken); nothing else."""

from __future__ import annotations

from pathlib import Path

import transformers


def tokenizer_json(folder: Path) -> bytes:
    """The content of a tokenizer.json for the tokenizer in `folder`; raises whatever transformers raises."""
    found = transformers.AutoTokenizer.from_pretrained(
        folder, use_fast=True, local_files_only=True, trust_remote_code=False
    )
    backend = getattr(found, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(found).__name__} has no fast form")
    content: str = backend.to_str()
    return content.encode()
