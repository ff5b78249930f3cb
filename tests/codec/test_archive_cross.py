"""A golden archive of a bundled model, decoded by the C core alone: here, on aarch64 and on big-endian s390x.

The program is csrc/check/archive_check.c. It also codes every segment again and compares the payload.
"""

from __future__ import annotations

import shutil
import subprocess

import archive_oracle
import dump_model
import golden_archives as golden
import pytest
from check_programs import ROOT, make

MACHINES = {"native": ("cc", ""), "aarch64": ("aarch64-linux-gnu-gcc", "qemu-aarch64")}
MACHINES["s390x"] = ("s390x-linux-gnu-gcc", "qemu-s390x")


@pytest.fixture(params=MACHINES)
def decoder(request) -> list[str]:
    """The command that starts archive_check, built for the machine."""
    compiler, emulator = MACHINES[request.param]
    for needed in ("make", compiler, *([emulator] if emulator else [])):
        if shutil.which(needed) is None:
            pytest.skip(f"{needed} is not installed")
    program = f"build/check/{request.param}/archive_check"
    done = make("-f", "csrc/check/check.mk", program)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return [*([emulator] if emulator else []), str(ROOT / program)]


# Building takes longer than a fast test may.
@pytest.mark.slow
def test_a_golden_archive_decodes_on_the_machine(decoder, tmp_path):
    """Mixed segments, and one of the model alone among them, included."""
    model = tmp_path / "model"
    for version, name in golden.pico_cases():
        if "stock" in version or name not in ("pico-short", "pico-drawn"):
            continue
        dump_model.main(name, str(model))
        arguments = [str(model), str(golden.pico_path(version, name))]
        found = subprocess.run([*decoder, *arguments], capture_output=True, check=True, timeout=600)
        assert found.stdout == golden.pico_content(name)


@pytest.mark.slow
def test_segments_of_stock_codecs_are_not_passed_over_in_silence(decoder, tmp_path):
    """The program has neither deflate nor LZMA: such segments are refused, or taken from the content and counted."""
    model, content = tmp_path / "model", tmp_path / "content"
    dump_model.main("pico-mixed", str(model), str(content))
    command = [*decoder, str(model), str(golden.pico_path("2 stock", "pico-mixed"))]
    found = subprocess.run(command, capture_output=True, check=False, timeout=600)
    assert found.returncode == 2 and found.stdout == b"" and b"needs CONTENT" in found.stderr
    found = subprocess.run([*command, str(content)], capture_output=True, check=True, timeout=600)
    assert found.stdout == content.read_bytes() and found.stderr.startswith(b"2 segments")


@pytest.mark.slow
def test_damage_and_another_model_are_told(decoder, tmp_path):
    """That the program compares: a flipped bit, a model with one other weight, and a byte behind a stream, zero or not,
    must not pass."""
    if decoder[0].startswith("qemu"):
        pytest.skip("the same program, natively, shows it")
    model, other, damaged = (tmp_path / name for name in ("model", "other", "damaged"))
    dump_model.main("pico-short", str(model))
    weights = bytearray(model.read_bytes())
    weights[500] ^= 0x40
    other.write_bytes(weights)
    archive = golden.pico_path("2", "pico-short").read_bytes()
    damaged.write_bytes(archive[:150] + bytes([archive[150] ^ 1]) + archive[151:])
    pairs = [[model, damaged], [other, golden.pico_path("2", "pico-short")]]
    for surplus in (b"\0", b"\1"):
        longer = tmp_path / f"longer{surplus.hex()}"
        longer.write_bytes(archive_oracle.with_payloads(archive, lambda payload, surplus=surplus: payload + surplus))
        pairs.append([model, longer])
    for arguments in pairs:
        found = subprocess.run([*decoder, *map(str, arguments)], capture_output=True, check=False, timeout=600)
        assert found.returncode in (1, 2) and found.stdout == b"" and found.stderr
