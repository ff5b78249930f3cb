"""Tokens are made once for each data set and mapping: counted, over models, cells, threads and processes."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmcomp import pico
from llmcomp.data import mappings, tokenizers
from llmcomp.data.token_cache import TokenCache
from llmcomp.data.tokenizers import ByteTokenizer, Tokenizer
from llmcomp.experiment.sweep import sweep
from llmcomp.scoring.published import PublishedTokens

CHUNKS = [b"The rain in Spain. " * 4, bytes(range(256)), "Grüße".encode() * 9, b"x"]


class Data:
    name, modality = "mixed", "text"
    chunks = CHUNKS


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(pico.tokenizer_path())


def same(first: list[mappings.Encoded], second: list[mappings.Encoded]) -> bool:
    return all(
        (a.tokens == b.tokens).all() and (a.side, a.side_bits, a.n_bytes) == (b.side, b.side_bits, b.n_bytes)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("name", mappings.MAPPINGS)
def test_what_the_mapping_gives(tokenizer: Tokenizer, name: str, tmp_path: Path) -> None:
    mapping = mappings.get_mapping(name)
    expected = [mapping.encode(chunk, tokenizer) for chunk in CHUNKS]
    cache = TokenCache(tmp_path)
    assert same(cache.encoded(mapping, tokenizer, CHUNKS), expected)
    assert cache.encoded(mapping, tokenizer, CHUNKS) is cache.encoded(mapping, tokenizer, CHUNKS)
    # Another process would read the folder.
    assert same(TokenCache(tmp_path).encoded(mapping, tokenizer, CHUNKS), expected)
    assert TokenCache(tmp_path / "missing").encoded(mapping, tokenizer, []) == []


def test_what_was_published(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chunks = [*CHUNKS, np.random.default_rng(0).bytes(2000)]
    expected = [PublishedTokens().encode(chunk, tokenizer) for chunk in chunks]
    for _ in range(2):
        found = TokenCache(tmp_path).encoded(PublishedTokens(), tokenizer, chunks)
        assert same(found, expected)
    assert found[-1].n_bytes < 2000


def test_other_tokenizers_mappings_and_chunks_are_others(tokenizer: Tokenizer) -> None:
    cache = TokenCache()
    keys = [("bytes", tokenizer, CHUNKS), ("bytes", ByteTokenizer(), CHUNKS), ("shift", tokenizer, CHUNKS)]
    keys += [("bytes", tokenizer, CHUNKS[:2]), ("bytes", tokenizer, [b"".join(CHUNKS[:2]), *CHUNKS[2:]])]
    lengths = [[len(item.tokens) for item in cache.encoded(mappings.get_mapping(name), *key)] for name, *key in keys]
    assert len({tuple(found) for found in lengths}) == len(keys)


def test_old_groups_are_dropped(tokenizer: Tokenizer) -> None:
    cache = TokenCache(max_bytes=1500)
    first = cache.encoded(mappings.get_mapping("bytes"), tokenizer, CHUNKS[:2])
    assert cache.encoded(mappings.get_mapping("bytes"), tokenizer, CHUNKS[:2]) is first
    cache.encoded(mappings.get_mapping("bytes"), tokenizer, CHUNKS[2:])
    assert cache.encoded(mappings.get_mapping("bytes"), tokenizer, CHUNKS[:2]) is not first


@pytest.mark.filterwarnings("ignore:.*tokens. the published protocol is cut there")
@pytest.mark.parametrize("n_threads", [0, 3])
def test_a_sweep_tokenises_once(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_threads: int) -> None:
    counts: Counter[str] = Counter()
    real_bytes, real_text = Tokenizer.encode_bytes, Tokenizer.encode_text

    def encode_bytes(self: Tokenizer, *args: Any) -> tokenizers.Tokens:
        counts["lossless"] += 1
        return real_bytes(self, *args)

    def encode_text(self: Tokenizer, text: str) -> tokenizers.Tokens:
        counts["published"] += 1
        return real_text(self, text)

    monkeypatch.setattr(Tokenizer, "encode_bytes", encode_bytes)
    monkeypatch.setattr(Tokenizer, "encode_text", encode_text)
    asked = {"protocol": ("lossless", "published"), "mapping": ("bytes", "ascii"), "progress": False}
    executor = concurrent.futures.ThreadPoolExecutor(n_threads) if n_threads else None
    rows = sweep(suite, (1, 2, 3), [Data()], tmp_path, executor, **asked)
    assert rows.attrs["failed"] == []
    assert rows.groupby(["step", "protocol", "mapping"]).ngroups == 9
    # Two lossless mappings, one published; three models.
    assert counts == {"lossless": 2 * len(CHUNKS), "published": len(CHUNKS)}


def count_in_a_process(folder: str, log: str) -> bool:
    """The group's tokens, with a line in `log` for every chunk that this process tokenised."""
    real = Tokenizer.encode_bytes

    def encode_bytes(self: Tokenizer, *args: Any) -> tokenizers.Tokens:
        with Path(log).open("a") as file:
            file.write("chunk\n")
        return real(self, *args)

    Tokenizer.encode_bytes = encode_bytes  # type: ignore[method-assign]
    made = TokenCache(folder).encoded(mappings.get_mapping("bytes"), Tokenizer.from_file(pico.tokenizer_path()), CHUNKS)
    return len(made) == len(CHUNKS)


def test_processes_share_a_folder(tmp_path: Path) -> None:
    folder, log = tmp_path / "tokens", tmp_path / "log"
    folder.mkdir()
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as executor:
        asked = [executor.submit(count_in_a_process, str(folder), str(log)) for _ in range(2)]
        assert all(future.result() for future in asked)
    assert len(log.read_text().splitlines()) == len(CHUNKS)


def test_a_sweep_in_processes_leaves_no_folder(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        rows = sweep(suite, (1,), [Data()], tmp_path / "out", executor, progress=False)
    assert len(rows) == len(CHUNKS)
    assert not list(tmp_path.glob("llmcomp-tokens-*"))
