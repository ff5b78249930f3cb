"""Writes the golden archives that are missing; never one that is there. Run from the folder tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import golden_archives as golden

from llmcomp import compress, load_model

for folder in golden.FOLDERS.values():
    folder.mkdir(exist_ok=True)
for version, name in golden.pico_cases():
    model, step, _, options = golden.PICO[name]
    path = golden.pico_path(version, name)
    if not path.exists():
        blob = compress(golden.pico_content(name), load_model(model, step), **options, **golden.WRITING[version])
        path.write_bytes(blob)
for case in golden.cases():
    version, tokenizer, options, content = case
    if not golden.path_of(case).exists():
        model = golden.IntegerModel(tokenizer)
        blob = compress(golden.CONTENTS[content], model, **golden.OPTIONS[options], **golden.WRITING[version])
        golden.path_of(case).write_bytes(blob)
