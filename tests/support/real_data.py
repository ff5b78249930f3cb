"""The real sample files, which are not part of the project: LLMCOMP_TEST_DATA names their folder. What needs them is
skipped where they are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("LLMCOMP_TEST_DATA") or Path(__file__).parents[3] / "shared/data")
needs_data = pytest.mark.skipif(not (DATA / "enwik8.head").exists(), reason=f"real sample files are not in {DATA}")
# Configurations, tokenizers and small models of published families.
FAMILIES_DATA = DATA / "families"
