"""verify: codes data with any predictor, decodes it elsewhere from the bytes alone, and certifies the number or not."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import platform
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from llmcomp.claims import worker
from llmcomp.claims.certificate import Certificate, Refused
from llmcomp.claims.predictors import GivenPredictor, Recipe, as_recipe, as_tokenizer, source_sha256
from llmcomp.codec.segments import as_chunks
from llmcomp.errors import Error
from llmcomp.version import __version__

# A claim may be below the ideal bits by this share: logarithms of other libraries.
CLAIM_TOLERANCE = 1e-3


def verify(
    predictor: Any,
    data: Any,
    *,
    tokenizer: Any = None,
    claim: float | None = None,
    progress: bool = True,
) -> Certificate:
    """A certificate that a predictor's bits per byte of `data` are real, or of what speaks against it.

    The data are coded with the predictor in one process and decoded in another, which is given the coded bytes and
    nothing else: its predictor sees decoded tokens only. A third asks the predictor questions (`claims.probes`).

    predictor: a model (an object with logits() and session()) or what `load_model` takes by name; a callable
        `predict(past)`, int32 [t] -> the probabilities of the next token, float [vocab_size]; or a command, a list of
        words, that speaks the line protocol of `claims.predictors`.
    data: bytes (one document), a path, several bytes objects or a data set; each document begins without a past. The
        denominator is their bytes as they are.
    tokenizer: of a callable or a command: one of llmcomp's, or the file or folder of one; default: tokens are bytes.
        A model has its own.
    claim: bits per byte that somebody states; refused where they are fewer than the ideal bits that decode.

    A named model, a command, and a predictor that can be pickled are made anew in fresh processes; else these are
    copies (forks) of the caller's, and `checks["decoder"]` says so. What no test can find is a predictor that contains
    the data and is asked for it by its content, or that reads it from a file: look at its size, which is told
    where it is known, and at its code. `Certificate.refusals` has what was found; nothing is raised for it.

    Raises:
        Error: no data, an empty document, no predictor, or one that fails.
    """
    recipe = as_recipe(predictor)
    documents, facts = _documents(data)
    given_tokenizer = None if tokenizer is None else as_tokenizer(tokenizer)
    certificate = Certificate(
        facts,
        {"kind": _KINDS[type(recipe).__name__], **recipe.facts()},
        software={"llmcomp": __version__, "python": platform.python_version(), "machine": platform.machine()},
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    run = _Runner(recipe, given_tokenizer, sum(map(len, documents)), progress)
    with _refusals_of(certificate):
        found = run("encode", documents)
        certificate.predictor |= found.pop("facts")
        certificate.checks |= found.pop("checks")
        with _refusals_of(certificate):
            decoded = run("decode", found["packed"])
            certificate.checks["decoded_sha256"] = hashlib.sha256(b"".join(decoded)).hexdigest()
            if decoded != documents:
                raise Refused(
                    "decoding", f"{_first_difference(documents, decoded)}: the numbers in decoding are others"
                )
            certificate.coded = _coded(found, facts["bytes"])
            _check_claim(certificate, claim)
        with _refusals_of(certificate):
            probed = run("probe", documents)
            for what, why in probed.pop("refused"):
                certificate.refuse(Refused(what, why))
            certificate.checks |= probed
    certificate.checks["decoder"] = run.where
    certificate.predictor |= run.facts
    return certificate


_KINDS = {
    "NamedModel": "named model",
    "ImportedPredictor": "imported",
    "CommandPredictor": "command",
    "GivenPredictor": "object",
}


@contextlib.contextmanager
def _refusals_of(certificate: Certificate) -> Iterator[None]:
    try:
        yield
    except Refused as error:
        certificate.refuse(error)


def _documents(data: Any) -> tuple[list[bytes], dict[str, Any]]:
    """The documents and what a certificate says of them."""
    name = getattr(data, "name", None)
    if isinstance(data, os.PathLike):
        path = Path(data)
        name = path.name
        try:
            documents = [path.read_bytes()]
        except OSError as error:
            raise Error(f"{path}: {error.strerror or error}") from error
    elif isinstance(data, (bytes, bytearray, memoryview)):
        documents = [bytes(data)]
    else:
        documents = as_chunks(_chunks_of(data))
    if not documents or not all(documents):
        raise Error(f"{len(documents)} documents: expected at least one, and none empty")
    whole, parted = hashlib.sha256(), hashlib.sha256()
    for document in documents:
        whole.update(document)
        parted.update(len(document).to_bytes(8, "little") + document)
    facts: dict[str, Any] = {"name": name} if isinstance(name, str) else {}
    facts |= {"bytes": sum(map(len, documents)), "documents": len(documents), "sha256": whole.hexdigest()}
    return documents, {**facts, "sha256_documents": parted.hexdigest()}


def _chunks_of(data: Any) -> Iterable[Any]:
    chunks = getattr(data, "chunks", data)
    if isinstance(chunks, str) or not hasattr(chunks, "__iter__"):
        raise Error(f"data is a {type(data).__name__}; expected bytes, a Path, several bytes objects or a data set")
    return chunks


def _coded(found: dict[str, Any], n_bytes: int) -> dict[str, Any]:
    packed, n_tokens, ideal_bits = found["packed"], found["n_tokens"], found["ideal_bits"]
    return {
        "bytes": len(packed),
        "sha256": hashlib.sha256(packed).hexdigest(),
        "bits": 8 * len(packed),
        "tokens": n_tokens,
        "bits_per_byte": 8 * len(packed) / n_bytes,
        "bits_per_token": 8 * len(packed) / n_tokens,
        "ideal_bits": ideal_bits,
        "ideal_bits_per_byte": ideal_bits / n_bytes,
    }


def _check_claim(certificate: Certificate, claim: float | None) -> None:
    if claim is None:
        return
    assert certificate.coded is not None
    certificate.checks["claimed_bits_per_byte"] = float(claim)
    ideal = certificate.coded["ideal_bits_per_byte"]
    if not claim >= ideal * (1 - CLAIM_TOLERANCE):
        raise Refused(
            "claim",
            f"{claim:.4f} bits per byte are claimed, {ideal:.4f} are the least that decode: "
            f"{certificate.data['bytes']:,} bytes are the data as they are",
        )


def _first_difference(documents: list[bytes], decoded: list[bytes]) -> str:
    for number, (document, found) in enumerate(zip(documents, decoded, strict=True)):
        if document != found:
            at = next((i for i, (a, b) in enumerate(zip(document, found, strict=False)) if a != b), len(found))
            return f"document {number} decodes to other bytes from byte {at} on"
    return "the documents are equal"


class _Runner:
    """Runs one verb after the other, each in a process of its own, and finds out which kind of process can."""

    def __init__(self, recipe: Recipe, tokenizer: Any, n_bytes: int, progress: bool):
        self._recipe, self._tokenizer, self._n_bytes, self._progress = recipe, tokenizer, n_bytes, progress
        self.facts: dict[str, Any] = {}
        try:
            self._pickled: bytes | None = pickle.dumps((recipe, tokenizer))
        except Exception:  # whatever a class's own pickling raises
            self._pickled = None
        if isinstance(recipe, GivenPredictor) and (digest := source_sha256(recipe.predictor)):
            self.facts["source_sha256"] = digest

    @property
    def where(self) -> str:
        return "a copy of this process (fork)" if self._pickled is None else "a fresh process"

    def __call__(self, verb: str, given: Any) -> Any:
        with self._bar(verb) as on_bytes:
            if self._pickled is not None:
                try:
                    found = worker.run_fresh(self._pickled, verb, given, on_bytes)
                except worker.CannotStart:
                    self._pickled = None
                else:
                    if isinstance(self._recipe, GivenPredictor):
                        digest = hashlib.sha256(self._pickled).hexdigest()
                        self.facts |= {"pickle_bytes": len(self._pickled), "pickle_sha256": digest}
                    return found
            return worker.run_forked(self._recipe, self._tokenizer, verb, given, on_bytes)

    @contextlib.contextmanager
    def _bar(self, verb: str) -> Iterator[Callable[[int], Any]]:
        from llmcomp.progress import tqdm

        total = self._n_bytes if verb != "probe" else None
        options: dict[str, Any] = {"unit": "B", "unit_scale": True, "delay": 2, "leave": False}
        with tqdm(total=total, desc=verb, disable=not self._progress, **options) as bar:
            yield bar.update
