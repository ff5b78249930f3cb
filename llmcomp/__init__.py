"""llmcomp: how well language models compress, measured in bytes that decode. Public names only.

Names are imported when first used, so that `import llmcomp` takes milliseconds and a fit needs no model code.
"""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

from llmcomp.errors import CorruptArchive, DatasetError, Error, ModelMismatch

if TYPE_CHECKING:
    from llmcomp.archive import open as open
    from llmcomp.codec import compress, decompress, score
    from llmcomp.coding import (
        Decoder,
        Encoder,
        backends,
        code_length,
        decode,
        encode,
        encode_intervals,
        intervals,
        use_backend,
        use_threads,
    )
    from llmcomp.datasets import load_dataset
    from llmcomp.law.figures import plot_all
    from llmcomp.law.fit import fit_scaling_law
    from llmcomp.models import list_models, load_model
    from llmcomp.position import bits_by_position
    from llmcomp.results import published, read_rows
    from llmcomp.sampling import generate
    from llmcomp.sweep import sweep

__version__ = metadata.version("llmcomp")

_MODULE_OF = {
    **dict.fromkeys(
        (
            "Decoder",
            "Encoder",
            "backends",
            "code_length",
            "decode",
            "encode",
            "encode_intervals",
            "intervals",
            "use_backend",
            "use_threads",
        ),
        "coding",
    ),
    **dict.fromkeys(("compress", "decompress", "score"), "codec"),
    **dict.fromkeys(("list_models", "load_model"), "models"),
    **dict.fromkeys(("published", "read_rows"), "results"),
    "bits_by_position": "position",
    "fit_scaling_law": "law.fit",
    "generate": "sampling",
    "load_dataset": "datasets",
    "open": "archive",
    "plot_all": "law.figures",
    "sweep": "sweep",
}

# Without `open`: what `import *` brings must not hide Python's own.
__all__ = [
    "CorruptArchive",
    "DatasetError",
    "Error",
    "ModelMismatch",
    "Decoder",
    "Encoder",
    "backends",
    "bits_by_position",
    "code_length",
    "compress",
    "decode",
    "decompress",
    "encode",
    "encode_intervals",
    "fit_scaling_law",
    "generate",
    "intervals",
    "list_models",
    "load_dataset",
    "load_model",
    "plot_all",
    "published",
    "read_rows",
    "score",
    "sweep",
    "use_backend",
    "use_threads",
]


def __getattr__(name: str) -> Any:
    if name == "plot":  # the module of the figures, as in `from llmcomp import plot`
        return importlib.import_module("llmcomp.law.plot")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'llmcomp' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"llmcomp.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
