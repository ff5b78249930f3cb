"""llmcomp: how well language models compress, measured in bytes that decode. Public names only.

Names are imported when first used, so that `import llmcomp` takes milliseconds and a fit needs no model code.
"""

import importlib
from typing import TYPE_CHECKING, Any

from llmcomp.errors import CorruptArchive, DatasetError, Error, ModelMismatch
from llmcomp.version import __version__ as __version__

if TYPE_CHECKING:
    from llmcomp.claims.compare import compare
    from llmcomp.claims.verify import verify
    from llmcomp.codec.archive import open as open
    from llmcomp.codec.compress import compress, decompress
    from llmcomp.codec.sampling import generate
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
    from llmcomp.data.datasets import load_dataset
    from llmcomp.experiment.sweep import sweep
    from llmcomp.law.figures import plot_all
    from llmcomp.law.fit import compare_forms, fit_scaling_law
    from llmcomp.law.joint import compare_shares, fit_joint
    from llmcomp.models.load import load_model
    from llmcomp.models.registry import list_models
    from llmcomp.results import published, read_rows
    from llmcomp.scoring.position import bits_by_position
    from llmcomp.scoring.score import score

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
    **dict.fromkeys(("compress", "decompress"), "codec.compress"),
    "list_models": "models.registry",
    "load_model": "models.load",
    "score": "scoring.score",
    **dict.fromkeys(("published", "read_rows"), "results"),
    "bits_by_position": "scoring.position",
    **dict.fromkeys(("compare_forms", "fit_scaling_law"), "law.fit"),
    **dict.fromkeys(("compare_shares", "fit_joint"), "law.joint"),
    "compare": "claims.compare",
    "verify": "claims.verify",
    "generate": "codec.sampling",
    "load_dataset": "data.datasets",
    "open": "codec.archive",
    "plot_all": "law.figures",
    "sweep": "experiment.sweep",
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
    "compare",
    "compare_forms",
    "compare_shares",
    "compress",
    "decode",
    "decompress",
    "encode",
    "encode_intervals",
    "fit_joint",
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
    "verify",
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
    return sorted({*__all__, "__version__", "open", "plot"})
