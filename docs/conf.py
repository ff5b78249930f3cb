"""Sphinx: pages in Markdown (MyST), the theme furo. `make docs`; what is not written by hand, generate.py writes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import generate

from llmcomp.version import __version__

project = "llmcomp"
author = "the authors of llmcomp"
release = __version__
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_generated/README.md"]
html_theme = "furo"
html_title = f"llmcomp {release}"
html_static_path: list[str] = []
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
smartquotes = False
nitpicky = True

generate.write(Path(__file__).parent / "_generated")
