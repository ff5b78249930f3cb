"""The certificate of `verify`: what was coded with which predictor, what was found, and what speaks against it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmcomp.atomic_write import write_beside
from llmcomp.errors import Error

VERSION = 1


class Refused(Error):
    """A predictor gave something that no number may stand on; `what` is the kind, one of `REFUSALS`."""

    def __init__(self, what: str, why: str):
        super().__init__(why)
        self.what = what


# kind: meaning
REFUSALS = {
    "distribution": "an answer that is no probability distribution over the tokens",
    "decoding": "the bytes do not decode, in another process, to the data",
    "future": "a distribution changes with tokens that come after it",
    "position": "the predictor knows tokens by their position, after a past that is not the data's",
    "claim": "the claimed bits per byte are fewer than those that decode",
}


@dataclass
class Certificate:
    """What `verify` found. `refusals` is empty where the number is real; `valid` says so.

    `data`: bytes, documents, sha256 (of all documents, one behind the other) and sha256_documents (of their lengths and
    contents). `predictor`: what it is and its digests. `coded`: bytes (all that the decoding process was given), their
    sha256, bits (8 bytes), bits_per_byte, bits_per_token, and the ideal bits; None where it could not be coded.
    `checks`: what was measured, by name. `software`: versions.
    """

    data: dict[str, Any]
    predictor: dict[str, Any]
    coded: dict[str, Any] | None = None
    checks: dict[str, Any] = field(default_factory=dict)
    software: dict[str, Any] = field(default_factory=dict)
    refusals: list[dict[str, str]] = field(default_factory=list)
    created: str = ""

    @property
    def valid(self) -> bool:
        """Whether the data were coded and decoded, and nothing speaks against the number."""
        return self.coded is not None and not self.refusals

    @property
    def bits_per_byte(self) -> float | None:
        """8 coded bytes over the bytes of the data as they are; None where nothing was coded."""
        return None if self.coded is None else self.coded["bits_per_byte"]

    def refuse(self, error: Refused) -> None:
        self.refusals.append({"what": error.what, "why": str(error)})

    def to_dict(self) -> dict[str, Any]:
        return {"llmcomp_certificate": VERSION, "valid": self.valid, **asdict(self)}

    def write(self, path: str | os.PathLike[str]) -> None:
        """As JSON; the file appears whole or not at all. `Error` if it cannot be written."""
        try:
            write_beside(path, (json.dumps(self.to_dict(), indent=1) + "\n").encode())
        except OSError as error:
            raise Error(f"{Path(path)}: cannot be written: {error.strerror or error}") from error

    def _digest(self) -> str:
        files = [f"{file['file']} {file['sha256']}" for file in self.predictor.get("files", ())]
        for name in ("sha256", "fingerprint", "source_sha256"):
            if found := self.predictor.get(name):
                return f"{name.replace('_', ' ').replace('sha256', 'SHA-256')} {found}"
        return f"SHA-256 of {', '.join(files)}" if files else "no digest known"

    def __str__(self) -> str:
        documents = self.data["documents"]
        lines = [
            f"data       {self.data['bytes']:,} bytes in {documents} document{'s' * (documents != 1)}, "
            f"SHA-256 {self.data['sha256']}",
            f"predictor  {self.predictor.get('name', '')} ({self.predictor['kind']}), {self._digest()}",
        ]
        if self.coded is not None:
            coded = self.coded
            lines += [
                f"coded      {coded['bytes']:,} bytes: {coded['bits_per_byte']:.4f} bits per byte, "
                f"{coded['bits_per_token']:.4f} bits per token ({coded['tokens']:,} tokens)",
                f"ideal      {coded['ideal_bits_per_byte']:.4f} bits per byte",
            ]
        if self.valid:
            lines.append(f"valid      decoded from the coded bytes alone in {self.checks['decoder']}")
        lines += [f"REFUSED    {refusal['what']}: {refusal['why']}" for refusal in self.refusals]
        return "\n".join(lines)

    def __repr__(self) -> str:
        state = "valid" if self.valid else f"refused: {', '.join(r['what'] for r in self.refusals) or 'nothing coded'}"
        bits = "" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f} bits per byte, "
        return f"<Certificate {self.predictor.get('name', '')}: {bits}{state}>"
