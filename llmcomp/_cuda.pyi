"""Types of the CUDA extension, for coding/cuda.py and models/engines/cuda.py; pointers and streams are integers."""

from typing import Any

from llmcomp.errors import Error

TOOLKIT_VERSION: int
TARGETS: str
ENCODER_BYTES: int
ENCODER_LENGTH_OFFSET: int
DECODER_BYTES: int
STEP_BYTES_MAX: int
VOCAB_SIZE_MAX: int

# rows: (pointer, outer stride, inner stride, n_rows, n_inner, vocab_size, dtype); tokens: (..., bytes of one)
Rows = tuple[int, int, int, int, int, int, int]
Tokens = tuple[int, int, int, int]

class OutOfMemoryError(Error): ...

class Buffer:
    def __init__(self, n_bytes: int, device: int) -> None: ...
    @property
    def pointer(self) -> int: ...
    @property
    def n_bytes(self) -> int: ...

class TransformerModel:
    def __init__(
        self,
        device: int,
        n_layers: int,
        n_heads: int,
        hidden: int,
        intermediate: int,
        n_embeddings: int,
        n_logits: int,
        context_length: int,
        rotary_dims: int,
        rotary_base: float,
        layer_norm_epsilon: float,
        parallel_residual: bool,
        tensors: tuple[Any, ...],
        int8: bool = False,
    ) -> None: ...
    @property
    def n_bytes(self) -> int: ...
    def cache_bytes(self, n_layers: int, n_streams: int, n_tokens: int, /) -> int: ...
    def work_bytes(self, n_rows: int, /) -> int: ...
    def session(self, n_layers: int, n_streams: int, n_tokens: int, n_rows: int, /) -> TransformerSession: ...

class TransformerSession:
    @property
    def stream(self) -> int: ...
    @property
    def n_bytes(self) -> int: ...
    def run_pass(
        self, tokens: int, row_begin: int, streams: int, n_stretches: int, n_rows: int, n_longest: int, /
    ) -> None: ...
    def head(self, first_row: int, n_rows: int, logits: int, /) -> None: ...
    def intervals(
        self,
        n_rows: int,
        targets: int,
        start: int,
        freq: int,
        total: int,
        vocab_size: int,
        n_logits_rows: int,
        logits: int,
        /,
    ) -> None: ...
    def log2_softmax(
        self, n_rows: int, targets: int, log2_probabilities: int, n_logits_rows: int, logits: int, /
    ) -> None: ...
    def step(self, tokens: int, logits: int, /) -> None: ...
    def decode_steps(
        self,
        n_steps: int,
        streams: int,
        decoders: int,
        tokens: int,
        log: int,
        n_logged: int,
        log_steps: int,
        n_rows: int,
        vocab_size: int,
        logits: int,
        /,
    ) -> None: ...
    def set_positions(self, first: int, positions: Any, /) -> None: ...
    def check(self) -> tuple[int, str] | None: ...

def machine() -> tuple[int, list[dict[str, Any]], str | None]: ...
def dlpack_view(capsule: Any, /) -> tuple[int, int, int, int, int, tuple[int, ...], tuple[int, ...] | None]: ...
def dlpack_capsule(buffer: Buffer, code: int, bits: int, shape: tuple[int, ...], /) -> Any: ...
def upload(device: int, stream: int, pointer: int, data: Any, /) -> None: ...
def download_rows(device: int, stream: int, pointer: int, pitch: int, n_bytes: int, n_rows: int, /) -> bytes: ...
def download(device: int, stream: int, pointer: int, target: Any, /) -> None: ...
def memory(device: int, /) -> tuple[int, int]: ...
def copy_rows_on_device(
    device: int,
    stream: int,
    target: int,
    target_pitch: int,
    source: int,
    source_pitch: int,
    n_bytes: int,
    n_rows: int,
    /,
) -> None: ...
def error_clear(device: int, stream: int, error: int, /) -> None: ...
def error_read(device: int, stream: int, error: int, /) -> tuple[int, bool, str] | None: ...
def is_capturing(device: int, stream: int, /) -> bool: ...
def device_of(pointer: int, /) -> int: ...
def intervals(
    device: int,
    stream: int,
    rows: Rows,
    tokens: Tokens,
    active: int,
    start: int,
    freq: int,
    total: int,
    error: int,
    /,
) -> None: ...
def log2_softmax(
    device: int, stream: int, rows: Rows, tokens: Tokens, log2_probabilities: int, error: int, /
) -> None: ...
def code_length(device: int, stream: int, n: int, freq: int, total: int, bits: int, /) -> None: ...
def encoders_begin(device: int, stream: int, encoders: int, n: int, data: int, capacity_bytes: int, /) -> None: ...
def encoders_place(device: int, stream: int, encoders: int, n: int, data: int, capacity_bytes: int, /) -> None: ...
def encoders_put(
    device: int, stream: int, encoders: int, n: int, start: int, freq: int, total: int, active: int, error: int, /
) -> None: ...
def encoders_end(device: int, stream: int, encoders: int, n: int, /) -> None: ...
def decoders_begin(device: int, stream: int, decoders: int, n: int, payloads: int, offsets: int, /) -> None: ...
def decode_step(
    device: int, stream: int, rows: Rows, active: int, decoders: int, tokens: int, error: int, /
) -> None: ...
def decode_stream(device: int, stream: int, rows: Rows, decoder: int, tokens: int, error: int, /) -> None: ...
