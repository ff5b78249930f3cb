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
    model, content = tmp_path / "model", golden.pico_content("pico-short")
    dump_model.main("pico-short", str(model))
    for version in golden.FOLDERS:
        if "stock" in version:
            continue  # the program has neither deflate nor LZMA
        archive = golden.pico_path(version, "pico-short")
        found = subprocess.run([*decoder, str(model), str(archive)], capture_output=True, check=True, timeout=600)
        assert found.stdout == content


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
