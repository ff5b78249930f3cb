"""The progress bar of everything that takes long: tqdm's, shown where somebody looks. Nothing else lives here."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import auto


def is_watched() -> bool:
    """Whether standard error is a terminal, or a notebook shows it. In a file or a pipe a bar is a flood of lines."""
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())


class tqdm(auto.tqdm):  # tqdm's own name: it is used as that is
    """tqdm.auto's, disabled where nobody looks."""

    def __init__(self, *args: Any, **options: Any):
        options["disable"] = options.get("disable") or not is_watched()
        super().__init__(*args, **options)
