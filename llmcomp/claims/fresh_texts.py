"""Models on texts that are newer than they are: a folder of them, its subfolders as categories.

Benchmarks leak into training data; texts of last week do not (the idea of Uncheatable Eval, github.com/Jellyfish042).
Every file is one document, all bytes of it are paid for, and what was read is known by its digest, so that two people
with the same folder can compare.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcomp.errors import DatasetError, Error
from llmcomp.models.adapter import ModelTraits
from llmcomp.models.load import load_model
from llmcomp.scoring.score import score

if TYPE_CHECKING:
    import pandas as pd

# The row over all categories, each of which counts alike.
MEAN = "mean"


def fresh_texts(
    folder: str | os.PathLike[str], models: Sequence[Any], *, not_before: float | None = None, progress: bool = True
) -> pd.DataFrame:
    """Bits per byte of every model on every category, best models first: one row for both, and MEAN of a model.

    folder: text files, in subfolders that are the categories, or without any ("" is then the category); hidden files
    are left out. models: models, or what `load_model` takes. not_before: seconds since 1970; an older file is an error.
    Columns: model, category, documents, bytes, tokens, bits_per_byte, bits_per_token, ratio, sha256 (of names and
    contents of the category's files).

    Raises:
        DatasetError: no files, an empty one, or one that is too old. Error: two models of one name.
    """
    import pandas as pd

    categories = _categories(Path(folder), not_before)
    rows: list[dict[str, Any]] = []
    for given in models:
        model = load_model(given)
        label = ModelTraits.of(model).label
        if label in {row["model"] for row in rows}:
            raise Error(f"two models are called {label}")
        for category, files in categories.items():
            found = score([content for _, content in files], model, progress=progress)
            n_bytes, n_tokens = int(found["bytes_in"].sum()), int(found["tokens"].sum())
            bits = float((8 * found["bytes_in"] * found["ratio"]).sum())
            rows.append(
                {
                    "model": label,
                    "category": category,
                    "documents": len(files),
                    "bytes": n_bytes,
                    "tokens": n_tokens,
                    "bits_per_byte": bits / n_bytes,
                    "bits_per_token": bits / n_tokens,
                    "ratio": bits / n_bytes / 8,
                    "sha256": _digest(files),
                }
            )
    table = pd.DataFrame(rows)
    order = ["category", "bits_per_byte"]
    return pd.concat(
        [_means(table).sort_values("bits_per_byte"), table.sort_values(order, kind="stable")], ignore_index=True
    )


def _means(table: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for label, part in table.groupby("model", sort=False):
        mean = float(part["bits_per_byte"].mean())
        whole = {name: int(part[name].sum()) for name in ("documents", "bytes", "tokens")}
        per_token = float(part["bits_per_token"].mean())
        means = {"bits_per_byte": mean, "bits_per_token": per_token, "ratio": mean / 8, "sha256": ""}
        rows.append({"model": label, "category": MEAN, **whole, **means})
    return pd.DataFrame(rows)


def _categories(folder: Path, not_before: float | None) -> dict[str, list[tuple[str, bytes]]]:
    """Category -> (name, content) of its files, by name."""
    if not folder.is_dir():
        raise DatasetError(f"{folder}: expected a folder of texts")
    categories: dict[str, list[tuple[str, bytes]]] = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or any(part.startswith(".") for part in parts):
            continue
        try:
            content, changed = path.read_bytes(), path.stat().st_mtime
        except OSError as error:
            raise DatasetError(f"{path}: {error.strerror or error}") from error
        if not content:
            raise DatasetError(f"{path} is empty")
        if not_before is not None and changed < not_before:
            raise DatasetError(f"{path} was changed last before the texts may be from: it is not fresh")
        categories.setdefault(parts[0] if len(parts) > 1 else "", []).append(("/".join(parts), content))
    if not categories:
        raise DatasetError(f"{folder}: no file in it")
    return categories


def _digest(files: Sequence[tuple[str, bytes]]) -> str:
    digest = hashlib.sha256()
    for name, content in files:
        digest.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape") + content)
    return digest.hexdigest()
