"""Sound -> chunks: 16-bit little-endian samples at 16 kHz, cut on the grid from the start of each utterance.

The utterances, and the segments of each, are put in order of a SHA-256; one segment of every utterance is taken in
turn. Nothing but FLAC and WAV files is read here.
"""

from __future__ import annotations

from pathlib import Path

from llmcomp.data.decoding import decoding
from llmcomp.data.drawing import Chunk, Found, Request, key_digest
from llmcomp.errors import DatasetError
from llmcomp.progress import tqdm

SAMPLE_RATE_HZ = 16_000
SAMPLE_BYTES = 2
_SPEECH_SUFFIXES = {".flac", ".wav"}
# A sound file may claim any number of samples.
_SAMPLES_MAX = 1 << 30


def speech_chunks(path: Path, request: Request) -> Found:
    """Segments of the utterances at `path`, a file or a folder of them."""
    chunk_bytes, seed = request.chunk_bytes, request.seed
    if chunk_bytes % SAMPLE_BYTES:
        raise DatasetError(f"a speech chunk has whole samples of 2 bytes, {chunk_bytes} bytes were asked for")
    found = path.rglob("*") if path.is_dir() else [path]
    files = [file for file in found if file.suffix.lower() in _SPEECH_SUFFIXES and file.is_file()]
    if not files:
        raise DatasetError(f"{path}: found no utterance, expected FLAC or WAV files")
    files.sort(key=lambda file: (key_digest(seed, file.name), str(file)))
    segments: dict[Path, list[int]] = {}
    for file in tqdm(files, desc=path.name, unit="file", disable=not request.progress, delay=2):
        n_segments = _n_samples(file) * SAMPLE_BYTES // chunk_bytes
        segments[file] = sorted(range(n_segments), key=lambda segment: key_digest(seed, file.name, segment))
    longest = max(map(len, segments.values()))
    turns = ((file, order[turn]) for turn in range(longest) for file, order in segments.items() if turn < len(order))
    chunks = []
    for _, (file, segment) in zip(range(request.n_chunks), turns, strict=False):
        first = segment * chunk_bytes // SAMPLE_BYTES
        samples = _pcm(file, first, chunk_bytes // SAMPLE_BYTES)
        chunks.append(Chunk(samples, f"{file.name} sample {first}", file.name, segment * chunk_bytes))
    return Found(chunks, sum(map(len, segments.values())), "spread", seed, chunk_bytes)


def _n_samples(file: Path) -> int:
    import soundfile

    with decoding(file, "not a readable sound file"):
        info = soundfile.info(str(file))
    if (info.samplerate, info.channels, info.subtype) != (SAMPLE_RATE_HZ, 1, "PCM_16"):
        raise DatasetError(
            f"{file}: found {info.samplerate} Hz, {info.channels} channel(s), {info.subtype}; "
            f"expected {SAMPLE_RATE_HZ} Hz, 1 channel, PCM_16"
        )
    if info.frames > _SAMPLES_MAX:
        raise DatasetError(f"{file}: claims {info.frames:,} samples, expected at most {_SAMPLES_MAX:,}")
    return int(info.frames)


def _pcm(file: Path, first: int, n_samples: int) -> bytes:
    import soundfile

    with decoding(file, "not a readable sound file"):
        samples, _ = soundfile.read(str(file), n_samples, first, dtype="int16")
    if len(samples) != n_samples:
        raise DatasetError(f"{file}: found {len(samples)} samples from {first} on, expected {n_samples}")
    return bytes(samples.astype("<i2").tobytes())
