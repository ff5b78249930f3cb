"""Calls from many threads, signals during calls and forks after them: the right answers or an exception, no crash."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import oracle
import pytest
from test_hostile import as_triples, check_still_right

import llmcomp
from llmcomp import coding


def run_together(function, n_threads=8):
    errors = []

    def guarded(i):
        try:
            function(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_many_threads_get_the_right_answers():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((40, 3000)).astype(np.float32)
    tokens = rng.integers(0, 3000, 40)
    expected = [oracle.interval(row, token) for row, token in zip(logits, tokens, strict=True)]
    payload = oracle.encode(expected)

    def work(i):
        with llmcomp.use_threads(i % 3 + 1), llmcomp.use_backend(llmcomp.backends()[i % len(llmcomp.backends())]):
            for _ in range(4):
                assert as_triples(llmcomp.intervals(logits, tokens)) == expected
                assert llmcomp.encode(logits, tokens) == payload
                assert llmcomp.decode(payload, logits).tolist() == tokens.tolist()

    run_together(work)


def test_one_encoder_from_many_threads():
    """A push that meets another gets an error; those that did not are all in the stream, in some order."""
    row = np.zeros((1, 50_000), np.float32)
    encoder = llmcomp.Encoder(1)
    pushed = []

    def work(_):
        for _ in range(20):
            try:
                encoder.push(row, [7])
                pushed.append(7)
            except llmcomp.Error as error:
                assert "another thread" in str(error)

    run_together(work)
    assert len(pushed) >= 20
    (payload,) = encoder.finish()
    assert payload == llmcomp.encode(np.broadcast_to(row, (len(pushed), 50_000)), pushed)


def test_arrays_changed_by_another_thread():
    """The numbers are anybody's guess; the process lives, and what is raised is one of ours."""
    logits = np.zeros((4, 5000), np.float32)
    tokens, active = np.zeros(4, np.int64), np.ones(4, bool)
    stop = threading.Event()

    def change():
        rng = np.random.default_rng(1)
        while not stop.is_set():
            logits[:, rng.integers(0, 5000, 50)] = rng.choice(np.float32([np.nan, np.inf, -np.inf, 3e38, 0, 50]), 50)
            tokens[:] = rng.integers(-2, 5002, 4)
            active[:] = rng.random(4) < 0.5
            logits[:, :] = 0

    writer = threading.Thread(target=change)
    writer.start()
    encoder, decoder = llmcomp.Encoder(4), llmcomp.Decoder([b"\x80\x33" * 200] * 4)
    calls = [
        lambda: llmcomp.intervals(logits, tokens),
        lambda: llmcomp.encode(logits, tokens),
        lambda: llmcomp.decode(b"\xfe" * 9, logits),
        lambda: encoder.push(logits, tokens, active),
        lambda: decoder.pull(logits, active),
        lambda: coding.log2_softmax(logits, tokens),
    ]
    try:
        for backend in llmcomp.backends():
            for i in range(200):
                with llmcomp.use_backend(backend), llmcomp.use_threads(i % 2 + 1):
                    for call in calls:
                        try:
                            result = call()
                        except llmcomp.Error:
                            continue
                        if call is calls[4]:
                            assert ((result >= -1) & (result < 5000)).all()
    finally:
        stop.set()
        writer.join()
    encoder.finish()
    check_still_right()


CHANGED_MEANWHILE = {
    "intervals": """
        totals = np.full(300_000, 1000)
        starts, freqs = totals // 2, totals // 100
        call, changed, wrong = lambda: coding.encode_intervals(starts, freqs, totals), totals[150_000:], 0
    """,
    "tokens": """
        tokens = np.ones((40, 40), np.int64)
        call, changed, wrong = lambda: model._core.intervals(tokens, np.ones_like(tokens)), tokens[20:], 1 << 40
    """,
    # Without targets: the message must name the token that was found, which may be right again.
    "tokens of logits": """
        tokens = np.ones((40, 40), np.int64)
        call, changed, wrong = lambda: model._core.logits(tokens), tokens[39:, 39:], 1 << 40
    """,
    "targets": """
        tokens, targets = np.ones((2, 40, 40), np.int64)
        def call():
            model._core.log2_probabilities(tokens, targets)
        changed, wrong = targets[20:], -1 << 40
    """,
    "lengths": """
        tokens, lengths = np.ones((2000, 2), np.int64), np.ones(2000, np.int64)
        call, changed, wrong = lambda: model._core.logits(tokens, lengths), lengths, 1 << 60
    """,
    "tokens of a step": """
        session, tokens = model._core.session(2000, 16), np.ones(2000, np.int64)
        def call():
            session.reset()
            session.step(tokens)
        changed, wrong = tokens[1000:], 1 << 40
    """,
    "tokens of a prefill": """
        session, tokens = model._core.session(1, 40), np.ones(40, np.int64)
        def call():
            session.reset()
            session.prefill(0, tokens)
        changed, wrong = tokens[20:], 1 << 40
    """,
    "tokens of a decoder": """
        session, tokens = model._core.session(500, 16), np.ones(500, np.int64)
        def call():
            session.reset()
            session.decode(llmcomp._core.Decoder([bytes(8)] * 500), tokens, 2)
        changed, wrong = tokens[250:], 1 << 40
    """,
    "pushed intervals": """
        totals = np.full(3000, 1000)
        starts, freqs = totals // 2, totals // 100
        def call():
            encoder = llmcomp.Encoder(3000)
            encoder.push_intervals(starts, freqs, totals)
            assert all(encoder.finish())
        changed, wrong = totals[1500:], 0
    """,
    # All streams but the first are full.
    "active": """
        session, active = model.session(2000, 16), np.ones(2000, np.bool_)
        for _ in range(16):
            session.step(np.ones(2000, np.int64))
        def call():
            session.reset(0)
            try:
                session.step(np.ones(2000, np.int64), active)
            finally:
                assert session.positions.max() <= 16
        changed, wrong = active[1:], False
    """,
}


RESHAPED_MEANWHILE = {
    "intervals": "llmcomp.intervals(logits, Tokens())",
    "log2_softmax": "coding.log2_softmax(logits, Tokens())",
    "encode": "llmcomp.encode(logits, Tokens())",
    "push": "llmcomp.Encoder(1).push(logits, Tokens())",
}


@pytest.mark.parametrize("what", RESHAPED_MEANWHILE)
def test_logits_that_change_their_shape_while_tokens_are_read(what):
    """As many rows as were counted are written: the shape that is compared with the tokens' must be the same."""
    program = f"""
        import numpy as np, llmcomp
        from llmcomp import coding
        class Tokens:
            def __array__(self, dtype=None, copy=None):
                logits.shape = (1, 1 << 21)
                return np.ones(1, np.int64)
        logits = np.zeros((1 << 19, 4), np.float32)
        try:
            {RESHAPED_MEANWHILE[what]}
        except llmcomp.Error as error:
            print(error)
    """
    done = run_alone(program)
    assert done.returncode == 0, done.stderr
    assert "tokens have shape (1,); expected (524288,)" in done.stdout


def run_alone(program):
    """In a process of its own, which may crash."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, timeout=60, check=False, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("what", CHANGED_MEANWHILE)
def test_arguments_that_change_meanwhile_crash_nothing(what):
    """They are checked and then used while other threads run: numbers out of range must not get through in between."""
    program = f"""
        import threading, time, numpy as np, llmcomp
        from llmcomp import coding
        from engine_models import make_config, make_weights
        from llmcomp.models.engines.exact import ExactModel
        model = ExactModel(make_config(), make_weights(make_config()))
        {textwrap.indent(textwrap.dedent(CHANGED_MEANWHILE[what]), " " * 8).strip()}
        right, stop = changed[0].copy(), threading.Event()
        def change():
            while not stop.is_set():
                changed[:] = wrong
                changed[:] = right
        writer = threading.Thread(target=change, daemon=True)
        writer.start()
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            try:
                call()
            except llmcomp.Error:
                pass
        stop.set()
        writer.join()
    """
    done = run_alone(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")
def test_signals_during_long_calls():
    row = np.zeros((1, 2**20), np.float32)
    rows = np.broadcast_to(row, (60, 2**20))
    tokens = np.arange(60)
    expected = [(t * (2**29 + 1), 2**29 + 1, 2**20 * (2**29 + 1)) for t in range(60)]
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        with llmcomp.use_threads(2):
            found = as_triples(llmcomp.intervals(rows, tokens))
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert seen and found == expected

        def interrupt(*_):
            raise KeyboardInterrupt

        signal.signal(signal.SIGALRM, interrupt)
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.005)
            for _ in range(1000):
                llmcomp.intervals(rows, tokens)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    check_still_right()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_after_the_pool_was_used():
    program = """
        import os, sys, numpy as np, llmcomp
        logits = np.random.default_rng(0).standard_normal((30, 9000)).astype(np.float32)
        def work():
            with llmcomp.use_threads(2):
                payload = llmcomp.encode(logits, np.arange(30))
                assert llmcomp.decode(payload, logits).tolist() == list(range(30))
                return payload
        payload = work()
        child = os.fork()
        if child == 0:
            os._exit(0 if work() == payload else 3)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or work() != payload)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0
