"""Writes the golden archives that are missing; never one that is there. Run from the folder tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from golden_archives import CONTENTS, FOLDER, OPTIONS, PICO, IntegerModel, cases, path_of, pico_content

from llmcomp import compress, load_model

FOLDER.mkdir(exist_ok=True)
for case in cases():
    if not path_of(case).exists():
        tokenizer, options, content = case
        path_of(case).write_bytes(compress(CONTENTS[content], IntegerModel(tokenizer), **OPTIONS[options]))
for name, (model, step, _, options) in PICO.items():
    path = FOLDER / f"{name}.llmc"
    if not path.exists():
        path.write_bytes(compress(pico_content(name), load_model(model, step), **options))
