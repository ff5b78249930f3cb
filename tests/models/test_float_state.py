"""Whatever float state a caller's libraries have left in the processor: the same models, bits and fingerprints, no
signal, and the state as it was. In processes of their own, with the C library's functions for the state of x86-64 and
AArch64."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import textwrap

import pytest

MACHINE = {"x86_64": "x86", "AMD64": "x86", "aarch64": "arm"}.get(platform.machine())
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or MACHINE is None,
    reason="the float state is set by functions of glibc on x86-64 and AArch64",
)

# fenv.h of glibc. Denormals flushed is bit 15 (and 6, for what is read) of MXCSR, which stands 28 bytes into fenv_t, or
# bit 24 of the control register with which AArch64's begins.
ROUNDINGS = {
    "x86": {"down": 0x400, "up": 0x800, "to zero": 0xC00},
    "arm": {"up": 0x400000, "down": 0x800000, "to zero": 0xC00000},
}
SET_STATE = f"""
    import ctypes, struct
    libm = ctypes.CDLL("libm.so.6")
    at, flush = {{"x86": (28, 0x8040), "arm": (0, 1 << 24)}}["{MACHINE}"]
    def control():
        state = ctypes.create_string_buffer(64)
        libm.fegetenv(state)
        return struct.unpack_from("<I", state, at)[0] & {0xFFC0 if MACHINE == "x86" else 0xFFFFFFFF:#x}
    def flush_denormals():
        state = ctypes.create_string_buffer(64)
        libm.fegetenv(state)
        struct.pack_into("<I", state, at, struct.unpack_from("<I", state, at)[0] | flush)
        libm.fesetenv(state)
"""
# Configurations with numbers that a wrong rounding reads wrongly, and denormal weights.
LOAD_AND_RUN = """
    import hashlib, json, os, sys, tempfile
    import numpy as np
    from pathlib import Path
    from safetensors.numpy import save_file
    from engine_models import make_config, make_weights
    import llmcomp
    config = make_config(rotary_pct=0.3, rotary_emb_base=10007.3, hidden_size=60)
    weights = make_weights(config)
    for name in weights:
        weights[name].reshape(-1)[::7] *= np.float32(1e-38)
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(CONFIG)
    save_file(weights, folder / "model.safetensors")
    SET
    before = control()
    tokens = np.arange(40).reshape(1, 40)
    for engine in ("exact", "exact-int8"):
        model = llmcomp.load_model(str(folder), engine=engine)
        logits = model.logits(tokens)
        payload = llmcomp.encode(logits[0], tokens[0])
        bits = llmcomp.code_length(logits[0], tokens[0])
        step = model.session(1).step(tokens[0, :1])
        found = [model.fingerprint, model.weights_sha256, model.config.norm_epsilon.hex(), payload.hex()]
        found += [hashlib.sha256(array.tobytes()).hexdigest() for array in (logits, bits, step)]
        print(engine, *found)
    assert control() == before, (hex(control()), hex(before))
"""
CONFIG_TEXT = (
    '{"model_type": "gpt_neox", "vocab_size": 61, "hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 3,'
    ' "intermediate_size": 40, "max_position_embeddings": 48, "rotary_pct": 0.3, "rotary_emb_base": 10007.3,'
    ' "layer_norm_eps": 1e-05, "use_parallel_residual": true, "tie_word_embeddings": false, "attention_bias": true,'
    ' "hidden_act": "gelu"}'
)
STATES = {
    **{f"rounding {name}": f"assert libm.fesetround({mode}) == 0" for name, mode in ROUNDINGS.get(MACHINE, {}).items()},
    "denormals flushed": "flush_denormals(); assert control() & flush",
}


def run(program: str) -> str:
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "LLMCOMP_THREADS": "2", "OMP_NUM_THREADS": "1"}
    text = textwrap.dedent(SET_STATE) + textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", text], check=False, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.returncode}\n{done.stderr}"
    return done.stdout


def load_and_run(state: str) -> str:
    return run(LOAD_AND_RUN.replace("SET", state).replace("CONFIG)", f"{CONFIG_TEXT!r})"))


@pytest.fixture(scope="module")
def expected() -> str:
    return load_and_run("pass")


@pytest.mark.parametrize("state", STATES)
def test_a_model_is_the_same_in_every_state(state: str, expected: str) -> None:
    assert load_and_run(STATES[state]) == expected
    assert len(expected.splitlines()) == 2


# Every entry point that makes floats, on numbers that are rounded, denormal, infinite and NaN on the way. Between the
# two calls of libm Python itself must make no float.
TRAPS = """
    import numpy as np
    from engine_models import make_config, make_weights
    from llmcomp import _core
    from llmcomp.errors import Error
    from llmcomp.models.engines.exact import ExactModel
    from llmcomp.models.checkpoint import core_arguments
    config = make_config(hidden_size=60, rotary_pct=0.3, vocab_size=300)
    weights = make_weights(config)
    for name in weights:
        weights[name].reshape(-1)[::7] *= np.float32(1e-38)
    broken = {name: np.full_like(array, 3e38) for name, array in weights.items()}
    made = [ExactModel(config, arrays) for arrays in (weights, broken)]
    arguments = [core_arguments(model.config, model._tensors, int8) for model in made for int8 in (False, True)]
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((700, 300)).astype(np.float32)
    logits[:, ::5] *= np.float32(1e-40)
    logits[:, 7] = -np.inf
    halves, wrong = logits.astype(np.float16), logits.copy()
    wrong[3, 3] = np.nan
    tokens = rng.integers(0, 300, 700)
    batch, one = tokens[:480].reshape(10, 48), np.ones(1, np.int64)

    def call():
        for rows in (logits, halves):
            _core.intervals(rows, tokens, None)
            _core.log2_softmax(rows, tokens, None)
            _core.decode(_core.encode(rows, tokens, None), rows, None)
        encoder = _core.Encoder(700)
        encoder.push(logits, tokens)
        _core.Decoder(encoder.finish()).pull(logits)
        for function in (_core.intervals, _core.log2_softmax):
            try:
                function(wrong, tokens, None)
            except Error:
                pass
        for these in arguments:
            model = _core.TransformerModel(**these)
            model.logits(batch)
            try:
                model.intervals(batch, batch)
                model.log2_probabilities(batch, batch)
            except Error:
                pass
            session = model.session(1, 48)
            session.prefill(0, batch[0, :20])
            session.step(one)
            try:
                session.decode(_core.Decoder([b"12345678"]), one, 3)
            except Error:
                pass

    every = 0x3D if at else 0x9F00  # FE_ALL_EXCEPT; of AArch64 the bits that enable, if the processor has them
    for backend in _core.backend_names():
        for n_threads in (1, 3):
            _core.set_override(backend, n_threads)
            before = control()
            libm.feenableexcept(every if at else every >> 8)
            unmasked = control()
            call()
            after = control()
            libm.fedisableexcept(every if at else every >> 8)
            assert unmasked == after, (hex(unmasked), hex(after))
            print(backend, n_threads, unmasked != before)
"""


def test_unmasked_traps_end_no_program() -> None:
    lines = run(TRAPS).splitlines()
    assert len(lines) >= 2
    if MACHINE == "x86":  # not every AArch64 processor has traps
        assert all(line.endswith(" True") for line in lines)
