"""What the pico suite is trained on: named bytes of text, images and speech, and their tokens.

Sources only: no model, no optimiser. Everything drawn here follows from the generator it is given. No image of
ImageNet, none of enwik8's first 1,000,000 bytes and nothing of the bundled samples may be read here.
"""

from __future__ import annotations

import io
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageDraw
from scipy.signal import resample_poly

from llmcomp.pico import CHUNK_BYTES

# enwik8's first 1,000,000 bytes are what everybody evaluates on; training starts at the next chunk of the file's grid.
TEXT_FIRST_BYTE = -(-1_000_000 // CHUNK_BYTES) * CHUNK_BYTES

# LibriSpeech speakers; every speaker that is not named here is held out.
TRAINING_SPEAKERS = ("1088", "2412", "4051", "4397", "5678", "7021")

# The bundled speech sample is spoken by a voice that is not among these (llmcomp/pico/samples.py).
ESPEAK_VOICES = ("en-us+m3", "en-gb+f3", "en-gb-scotland+m1", "en-gb-x-rp+m7", "en-gb-x-gbclan+f4", "en-us+f1")
ESPEAK_WORDS_PER_MINUTE = (130, 150, 170, 190)

IMAGE_ROWS, IMAGE_COLUMNS = 32, 64
SAMPLE_RATE_HZ = 16_000


@dataclass(frozen=True)
class Source:
    """One file's worth of training data; `recorded` sources have their chunks' hashes kept beside the weights."""

    name: str
    data: bytes
    recorded: bool = True

    def chunks(self) -> Iterator[bytes]:
        """The whole chunks of 2,048 bytes on the source's own grid, and the shorter rest."""
        for at in range(0, len(self.data), CHUNK_BYTES):
            yield self.data[at : at + CHUNK_BYTES]


def wikipedia(path: Path) -> list[Source]:
    """enwik8 (or its head) from byte 1,001,472 on: the first chunk of the file's grid past byte 1,000,000."""
    data = path.read_bytes()[TEXT_FIRST_BYTE:]
    return [Source(f"enwik8[{TEXT_FIRST_BYTE}:{TEXT_FIRST_BYTE + len(data)}]", data)]


def python_library() -> list[Source]:
    """CPython's own modules, with their documentation strings, and its licence, as installed; never `pydoc_data`."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [folder / "LICENSE.txt", *sorted(folder.glob("*.py"))]
    return [Source(f"cpython/{file.name}", file.read_bytes()) for file in files if file.is_file()]


def librispeech(folder: Path) -> list[Source]:
    """The utterances of `TRAINING_SPEAKERS` as 16-bit little-endian PCM. CC BY 4.0, Panayotov et al., ICASSP 2015."""
    files = [file for file in sorted(folder.glob("*.flac")) if file.name.split("-")[0] in TRAINING_SPEAKERS]
    return [Source(f"librispeech/{file.stem}", pcm_bytes(soundfile.read(file, dtype="int16")[0])) for file in files]


def pcm_bytes(samples: np.ndarray) -> bytes:
    """int16 [N] -> 2N bytes, little-endian."""
    return samples.astype("<i2").tobytes()


def espeak_pcm(text: str, voice: str, words_per_minute: int) -> np.ndarray:
    """`text` spoken by espeak-ng: int16 [N] at 16 kHz."""
    command = ["espeak-ng", "-v", voice, "-s", str(words_per_minute), "--stdout"]
    wav = subprocess.run([*command, text], check=True, capture_output=True).stdout
    # The header of a streamed WAV holds no true length: take the 44-byte header's rate, and all that follows.
    rate_hz = int.from_bytes(wav[24:28], "little")
    samples = np.frombuffer(wav[44 : len(wav) - len(wav) % 2], "<i2").astype(np.float64)
    divisor = np.gcd(rate_hz, SAMPLE_RATE_HZ)
    resampled = resample_poly(samples, SAMPLE_RATE_HZ // divisor, rate_hz // divisor)
    return np.clip(np.rint(resampled), -32768, 32767).astype(np.int16)


def sentences(text: str) -> list[str]:
    """Plain sentences among the lines of a Wikipedia dump, markup removed."""
    text = re.sub(r"\[\[(?:[^]|]*\|)?([^]|]*)\]\]", r"\1", text)
    return re.findall(r"(?:(?<=\. )|(?<=\n))[A-Z][a-zA-Z ,;]{60,160}\.(?=\s)", text)


def synthetic_speech(text: str, n_utterances: int, rng: np.random.Generator) -> list[Source]:
    """Sentences of the training text in every voice and speed in turn, at recording levels, with some room noise."""
    spoken = sentences(text)
    sources = []
    for i in range(n_utterances):
        voice = ESPEAK_VOICES[i % len(ESPEAK_VOICES)]
        speed = ESPEAK_WORDS_PER_MINUTE[i // len(ESPEAK_VOICES) % len(ESPEAK_WORDS_PER_MINUTE)]
        samples = espeak_pcm(spoken[rng.integers(len(spoken))], voice, speed) * np.exp(rng.uniform(-2.2, -0.3))
        samples += rng.normal(size=len(samples)) * np.exp(rng.uniform(0, 3))
        pcm = pcm_bytes(np.clip(np.rint(samples), -32768, 32767))
        sources.append(Source(f"espeak-ng/{i:03d} {voice} {speed} words per minute", pcm))
    return sources


def photographs(n_images: int, rng: np.random.Generator) -> list[Source]:
    """Grey 32x64 crops of scikit-learn's two photographs, scaled, mirrored, brightened and darkened at random."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(pixels).convert("L") for pixels in load_sample_images().images]
    crops: list[Source] = []
    while len(crops) < n_images:
        photo = photos[rng.integers(len(photos))]
        scale = np.exp(rng.uniform(np.log(0.25), np.log(1.3)))
        columns, rows = IMAGE_COLUMNS / scale, IMAGE_ROWS / scale
        left, top = rng.uniform(0, photo.width - columns), rng.uniform(0, photo.height - rows)
        box = (left, top, left + columns, top + rows)
        crop = np.asarray(photo.resize((IMAGE_COLUMNS, IMAGE_ROWS), Image.Resampling.BICUBIC, box=box), np.float64)
        # Sky and backdrop fill most of both photographs: one in five of such crops is enough.
        if crop.std() > 8 or rng.random() < 0.2:
            crops.append(_as_source("photograph", _varied(crop, rng)))
    return crops


def drawn_images(n_images: int, rng: np.random.Generator) -> list[Source]:
    """Grey 32x64 images drawn at random: gradients, 1/f textures, overlapping shapes; half went through JPEG."""
    images = []
    for _ in range(n_images):
        canvas = _canvas(rng)
        if rng.random() < 0.5:
            canvas = _through_jpeg(canvas, int(rng.integers(60, 96)))
        images.append(_as_source("drawn", _varied(canvas, rng)))
    return images


def _as_source(name: str, pixels: np.ndarray) -> Source:
    return Source(name, np.clip(np.rint(pixels), 0, 255).astype(np.uint8).tobytes(), recorded=False)


def _varied(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrored, with another contrast and brightness."""
    pixels = pixels[:, :: rng.choice((-1, 1))][:: rng.choice((-1, 1)), :]
    mean = pixels.mean()
    return (pixels - mean) * rng.uniform(0.5, 1.3) + 0.8 * mean + 0.2 * 128 + rng.normal() * 15


def _texture(rng: np.random.Generator) -> np.ndarray:
    """A field with power spectrum 1/f^(2a), a from 0.8 to 2, mean 0, unit variance."""
    frequency = np.hypot(np.fft.fftfreq(2 * IMAGE_ROWS)[:, None], np.fft.rfftfreq(2 * IMAGE_COLUMNS)[None, :])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.normal(size=(2 * IMAGE_ROWS, 2 * IMAGE_COLUMNS))) / frequency ** rng.uniform(0.8, 2)
    field = np.fft.irfft2(spectrum)[:IMAGE_ROWS, :IMAGE_COLUMNS]
    return (field - field.mean()) / field.std()


def _canvas(rng: np.random.Generator) -> np.ndarray:
    """Leaves that hide each other (Lee, Mumford and Huang, 2001), drawn at four times the size, each with a texture."""
    slopes = rng.normal(size=2) * 40
    rows, columns = np.linspace(-1, 1, IMAGE_ROWS)[:, None], np.linspace(-1, 1, IMAGE_COLUMNS)[None, :]
    canvas = rng.uniform(30, 220) + slopes[0] * rows + slopes[1] * columns + _texture(rng) * rng.gamma(1, 12)
    for _ in range(rng.integers(0, 9)):
        mask = Image.new("L", (4 * IMAGE_COLUMNS, 4 * IMAGE_ROWS))
        centre = rng.uniform(0, 1, 2) * (4 * IMAGE_COLUMNS, 4 * IMAGE_ROWS)
        radius = np.minimum(8 / rng.random(), 150) * rng.uniform(0.4, 1.6, 2)
        corners = centre + rng.normal(size=(rng.integers(3, 6), 2)) * radius
        pen = ImageDraw.Draw(mask)
        if rng.random() < 0.5:
            pen.ellipse((*(centre - radius), *(centre + radius)), fill=255)
        else:
            pen.polygon([tuple(corner) for corner in corners], fill=255)
        cover = np.asarray(mask.resize((IMAGE_COLUMNS, IMAGE_ROWS), Image.Resampling.BOX), np.float64) / 255
        leaf = rng.uniform(0, 255) + rng.normal() * 20 * rows + _texture(rng) * rng.gamma(1, 8)
        canvas = canvas * (1 - cover) + leaf * cover
    return canvas + rng.normal(size=canvas.shape) * rng.gamma(1, 1.5)


def _through_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), np.float64)
