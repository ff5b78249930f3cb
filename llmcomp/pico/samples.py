"""How the bundled samples were made: `python -m llmcomp.pico.samples`. Nothing in them was trained on.

Origins and licences stand in `samples/README.md`. Needs the extra `[train]` and espeak-ng; reading the samples is
`llmcomp.datasets`'s work.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from pathlib import Path

import matplotlib
import numpy as np
import soundfile
from PIL import Image

from llmcomp.atomic_write import write_beside, written_beside
from llmcomp.pico import sample_path
from llmcomp.pico.corpus import SAMPLE_RATE_HZ, espeak_pcm

TEXT_BYTES = 98_304

# No model of the suite has heard this voice (corpus.ESPEAK_VOICES) or these sentences.
SPEECH_VOICE = "en-029"
SPEECH_WORDS_PER_MINUTE = 160
# espeak-ng speaks at full scale; recorded speech does not.
SPEECH_GAIN = 0.3
SENTENCES = (
    "A ferry crosses the bay twice a day, and in winter it carries more letters than people.",
    "When the kettle whistles, put the basil on the plate and call the others in from the yard.",
)


def documentation() -> bytes:
    """The first topics, in alphabetical order, of CPython's documentation as `help()` shows it."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name].strip() for name in sorted(topics)).encode("utf-8")
    return text[:TEXT_BYTES].decode("utf-8", "ignore").encode("utf-8")


def photograph() -> Image.Image:
    """Matplotlib's sample photograph, turned to grey."""
    file = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(file) as photo:
        return photo.convert("L")


def main() -> None:
    argparse.ArgumentParser(prog="python -m llmcomp.pico.samples", description=__doc__).parse_args()
    text, image, speech = (sample_path(modality) for modality in ("text", "image", "speech"))
    write_beside(text, documentation())
    with written_beside(image) as file:
        photograph().save(file, "PNG", optimize=True)
    spoken = espeak_pcm(" ".join(SENTENCES), SPEECH_VOICE, SPEECH_WORDS_PER_MINUTE)
    spoken = np.rint(SPEECH_GAIN * spoken).astype(np.int16)
    with written_beside(speech) as file:
        soundfile.write(file, spoken, SAMPLE_RATE_HZ, subtype="PCM_16", format="FLAC")


if __name__ == "__main__":
    main()
