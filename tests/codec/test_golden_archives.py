"""The golden archives are read by the package and by a second decoder, and are written again bit for bit, forever."""

from __future__ import annotations

import io
import json

import archive_oracle
import golden_archives as golden
import pytest
from tiny_models import starter

import llmcomp
from llmcomp import compress, decompress, pico
from llmcomp.codec.salvage import salvage_segments
from llmcomp.errors import CorruptArchive

CASES = golden.cases()
PICO = golden.pico_cases()


def label(case: golden.Case) -> str:
    return "-".join(map(str, case))


@pytest.fixture(scope="module")
def models() -> dict[str, golden.IntegerModel]:
    return {tokenizer: golden.IntegerModel(tokenizer) for tokenizer in golden.TOKENIZERS}


def test_no_golden_archive_is_missing_or_unknown():
    pico_paths = {golden.pico_path(version, name) for version, name in PICO}
    found = {path for folder in golden.FOLDERS.values() for path in folder.iterdir()}
    assert {golden.path_of(case) for case in CASES} | pico_paths == found


def test_the_versions_are_those_of_the_folders():
    for form, folder in golden.FOLDERS.items():
        assert {path.read_bytes()[4] for path in folder.iterdir()} == {int(form[0])}
        named = [archive_oracle.read_header(archive_oracle.Reader(path.read_bytes())) for path in folder.iterdir()]
        assert {header["mixing"] for header in named if "mixing" in header} == {int("mixed" in form)}


@pytest.mark.parametrize("case", CASES, ids=label)
def test_the_package_reads_and_writes_it(case, models):
    version, tokenizer, options, content = case
    blob = golden.path_of(case).read_bytes()
    assert decompress(blob, models[tokenizer]) == golden.CONTENTS[content]
    options = golden.OPTIONS[options] | golden.WRITING[version]
    if "stock" not in version:
        assert compress(golden.CONTENTS[content], models[tokenizer], **options) == blob


# The whole set takes a quarter of a minute.
FAST = [
    case
    for case in CASES
    if "stock" in case[0] or case[2] in ("default", "overlap15") or (case[2] != "wide" and case[3] == "text")
]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in FAST else pytest.mark.slow, id=label(case)) for case in CASES]
)
def test_the_second_decoder_reads_it(case, models):
    _, tokenizer, _, content = case
    description = golden.TOKENIZERS[tokenizer]
    table, stand_ins = archive_oracle.vocabulary(description) if description else ([bytes([b]) for b in range(256)], {})
    blob = golden.path_of(case).read_bytes()
    assert archive_oracle.decode(blob, table, stand_ins, starter(models[tokenizer])) == golden.CONTENTS[content]


@pytest.mark.parametrize(("version", "name"), PICO)
def test_the_exact_engine_reads_and_writes_it(version, name):
    model_name, step, _, options = golden.PICO[name]
    blob = golden.pico_path(version, name).read_bytes()
    assert decompress(blob) == golden.pico_content(name)
    options = options | golden.WRITING[version]
    if "stock" not in version:
        assert compress(golden.pico_content(name), llmcomp.load_model(model_name, step), **options) == blob


@pytest.mark.parametrize(
    ("version", "name"),
    [pytest.param(v, n, marks=[] if n in ("pico-short", "pico-drawn") else pytest.mark.slow) for v, n in PICO],
)
def test_the_second_decoder_with_the_exact_engine(version, name):
    """Step by step through the serial backend, without the package's decoder, windows or batches."""
    model_name, step, _, _ = golden.PICO[name]
    model = llmcomp.load_model(model_name, step)

    def start():
        session = model.session(1)
        return lambda token: session.step([token])[0]

    table, stand_ins = archive_oracle.vocabulary(json.loads(pico.tokenizer_path().read_bytes()))
    blob = golden.pico_path(version, name).read_bytes()
    with llmcomp.use_backend("serial"):
        assert archive_oracle.decode(blob, table, stand_ins, start) == golden.pico_content(name)


def test_both_decoders_cut_the_archive_into_the_same_segments():
    for case in CASES:
        blob = golden.path_of(case).read_bytes()
        _, expected, _, _ = archive_oracle.read_segments(blob)
        found = [(s.n_bytes, s.stored, s.payload) for s in salvage_segments(io.BytesIO(blob))]
        assert found == expected


def test_the_set_covers_coded_and_stored_segments_and_stand_ins():
    kinds = set()
    for case in CASES:
        if "stock" in case[0]:
            continue
        header, segments, _, _ = archive_oracle.read_segments(golden.path_of(case).read_bytes())
        for _, is_stored, payload in segments:
            kinds.add((case[1], header.get("mapping"), "stored" if is_stored else "coded"))
            if case[1] == "lacking" and header.get("mapping") == 0 and not is_stored:
                kinds.add(payload[:1])
    assert {b"\x00", b"\x80"} <= kinds
    for tokenizer in golden.TOKENIZERS:
        for mapping in (0, 1, 3):
            assert (tokenizer, mapping, "coded") in kinds
        assert (tokenizer, 0, "stored") in kinds


def test_the_set_covers_stock_codecs_beside_all_else():
    kinds = set()
    for case in CASES:
        if "stock" in case[0]:
            header, segments, _, _ = archive_oracle.read_segments(golden.path_of(case).read_bytes())
            for _, is_stored, payload in segments:
                kind = "stored" if is_stored else payload[-2] if payload[-1] == 0 and len(payload) > 1 else "model"
                kinds.add(("mapping" in header, kind))
    assert {(True, 1), (True, 2), (True, "model"), (True, "stored"), (False, 1)} <= kinds


def test_a_segment_that_is_shorter_without_mixing_is_among_mixed_ones():
    blob = golden.pico_path("2 mixed or not", "pico-drawn").read_bytes()
    header, segments, _, _ = archive_oracle.read_segments(blob)
    assert header["mixing"] == 1 and not any(is_stored for _, is_stored, _ in segments)
    assert [payload[-2:] == b"\3\0" for _, _, payload in segments] == [False, False, False, True]


@pytest.mark.parametrize(
    "case", [case for case in CASES if (case[3] == "text" and "bpe" in case) or case[3] == "empty"], ids=label
)
def test_every_truncation_and_flipped_bit_is_refused(case, models):
    """With the model that made it, all the way through `decompress`."""
    blob = golden.path_of(case).read_bytes()
    for n_bytes in range(len(blob)):
        with pytest.raises(CorruptArchive):
            decompress(blob[:n_bytes], models[case[1]])
    for bit in range(8 * len(blob)):
        bad = bytearray(blob)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptArchive):
            decompress(bytes(bad), models[case[1]])
