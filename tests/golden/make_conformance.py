"""Adds the digests of new cases to llmcomp/conformance/digests.json: python tests/golden/make_conformance.py

Those that are there never change; a case that computes something else gets another name. Computed by the serial
backend, the specification; tests/test_conformance.py compares with what is no part of the package.
"""

from __future__ import annotations

import json

import llmcomp
from llmcomp.atomic_write import written_beside
from llmcomp.conformance.cases import all_cases, digest
from llmcomp.conformance.selftest import DIGESTS

known = json.loads(DIGESTS.read_text("utf-8"))
with llmcomp.use_backend("serial"):
    found = {name: known.get(name) or digest(case, "cpu") for name, case in all_cases().items()}
with written_beside(DIGESTS) as file:
    file.write((json.dumps(found, indent=1) + "\n").encode())
print(f"{len(found) - len(known)} digests added, {len(found)} in all")
