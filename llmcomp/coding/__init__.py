"""Arrays <-> integer intervals <-> payload bytes, on the processor and on a device. No models, no data sets.

The core's Python interface is streams.py; cuda.py and device_arrays.py do the same for arrays on a CUDA device.
"""

from llmcomp.coding.streams import (
    Decoder,
    Encoder,
    backend_in_use,
    backends,
    code_length,
    decode,
    encode,
    encode_intervals,
    intervals,
    log2_softmax,
    mix_intervals,
    threads_in_use,
    use_backend,
    use_threads,
)

__all__ = [
    "Decoder",
    "Encoder",
    "backend_in_use",
    "backends",
    "code_length",
    "decode",
    "encode",
    "encode_intervals",
    "intervals",
    "log2_softmax",
    "mix_intervals",
    "threads_in_use",
    "use_backend",
    "use_threads",
]
