"""Downloads against a server on 127.0.0.1 that cuts, lies and disappears: whole and right, or not there at all."""

import errno
import hashlib
import http.server
import io
import json
import os
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llmcomp.data import download as download_module
from llmcomp.data.datasets import load_dataset
from llmcomp.data.download import REMOTES, Remote, download, fetch, fetched_path
from llmcomp.errors import DatasetError

CONTENT = np.random.default_rng(11).bytes(3_000_000)
COMMIT = "0123456789abcdef" * 2 + "01234567"
BLOCK = 16_384  # what is kept of a lost connection is whole blocks
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


class Server:
    """Serves `files`; `cut` bytes of a body are sent before the connection closes; `log` has the requested ranges.

    Files below /datasets/ have the headers of the Hugging Face hub.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/file": CONTENT}
        self.cut: list[int] = []
        self.statuses: list[int] = []
        self.ranges = True
        self.gated = False
        self.log: list[str | None] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def do_HEAD(self) -> None:
                server.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_address[1]}"
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range")
        self.log.append(asked)
        path = request.path.partition("?")[0]
        body = self.files.get(path)
        if self.gated and path.startswith("/datasets/"):
            request.send_response(401)
            request.send_header("X-Error-Code", "GatedRepo")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if body is None or self.statuses:
            request.send_error(self.statuses.pop(0) if self.statuses else 404)
            return
        start = 0
        if asked and self.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            request.send_response(200)
        if path.startswith("/datasets/"):
            request.send_header("X-Repo-Commit", COMMIT)
            request.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        request.send_header("Content-Length", str(len(body) - start))
        request.end_headers()
        if request.command == "HEAD":
            return
        request.wfile.write(body[start:][: self.cut.pop(0) if self.cut else None])

    def stop(self) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def get(server: Server, path: Path, checksum: str | None = MD5, attempts: int = 3) -> Path:
    return download(f"{server.url}/file", path, len(CONTENT), checksum, progress=False, attempts=attempts, wait_s=0.01)


def test_whole_file_is_fetched_once(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert get(server, path).read_bytes() == CONTENT
    assert get(server, path).read_bytes() == CONTENT
    assert server.log == [None]
    assert names_in(tmp_path) == ["file"]


def test_lost_connections_go_on_where_they_stopped(server: Server, tmp_path: Path) -> None:
    server.cut = [60 * BLOCK, 30 * BLOCK + 5, 0]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.log == [None, *(f"bytes={n * BLOCK}-" for n in (60, 90, 90))]


def test_interrupted_download_is_resumed_by_the_next(server: Server, tmp_path: Path) -> None:
    server.cut = [75 * BLOCK, 0]
    with pytest.raises(DatasetError, match=r"got 1,228,800 of 3,000,000 bytes.*file\.part.*goes on"):
        get(server, tmp_path / "file", attempts=1)
    assert names_in(tmp_path) == ["file.part"]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.log[-1] == "bytes=1228800-"


def test_server_gone(server: Server, tmp_path: Path) -> None:
    server.stop()
    with pytest.raises(DatasetError, match=r"got 0 of 3,000,000 bytes"):
        get(server, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cut = [1_000_000]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("status", [403, 404])
def test_refusal_is_told_at_once(server: Server, tmp_path: Path, status: int) -> None:
    server.statuses = [status]
    with pytest.raises(DatasetError, match=f"answers {status}"):
        get(server, tmp_path / "file")
    assert len(server.log) == 1


def test_failing_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 500]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT


def test_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.files["/file"] = CONTENT[:-1] + b"?"
    with pytest.raises(DatasetError, match=f"wrong checksum: found md5:.*expected {MD5}"):
        get(server, tmp_path / "file")
    assert names_in(tmp_path) == []


def test_stale_part_is_thrown_away(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"of an older file" * 100)
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.log == ["bytes=1600-", None]


def test_wrong_size_is_told_before_the_download(server: Server, tmp_path: Path) -> None:
    server.files["/file"] = CONTENT + b"more"
    with pytest.raises(DatasetError, match="offers 3,000,004 bytes, expected 3,000,000"):
        get(server, tmp_path / "file")


def test_full_disk_while_writing(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(file: io.FileIO, block: bytes) -> None:
        file.write(block[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(download_module, "_write", write)
        with pytest.raises(DatasetError, match="the disk is full"):
            get(server, tmp_path / "file")
    assert names_in(tmp_path) == ["file.part"]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT


def test_too_little_room_is_told_first(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DatasetError, match="1,000 bytes free, 3,000,000 needed"):
        get(server, tmp_path / "file")
    assert server.log == []


def test_unwritable_folder(server: Server, tmp_path: Path) -> None:
    (tmp_path / "no-folder").write_text("")
    with pytest.raises(DatasetError, match="cannot be written"):
        get(server, tmp_path / "no-folder" / "file")


def test_two_processes_do_not_write_one_file(server: Server, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "file.part").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DatasetError, match="another process"):
            get(server, tmp_path / "file")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMCOMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLMCOMP_DATA_URL", raising=False)
    return tmp_path / "cache"


def serve_enwik8(
    server: Server, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes] = lambda archive: archive
) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", CONTENT)
    content = damage(file.getvalue())
    server.files["/mirror/enwik8.zip"] = content
    sha256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    small = Remote("https://127.0.0.1:1/enwik8.zip", len(content), len(CONTENT), "enwik8", content_checksum=sha256)
    monkeypatch.setitem(REMOTES, "enwik8", small)


def test_fetch_enwik8(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_enwik8(server, monkeypatch)
    assert fetched_path("enwik8") is None
    server.cut = [1_000_000]
    monkeypatch.setenv("LLMCOMP_DATA_URL", f"{server.url}/mirror/")
    path = fetch("enwik8", progress=False)
    assert path.read_bytes() == CONTENT
    assert names_in(cache) == ["enwik8"]
    assert load_dataset("enwik8", 3, progress=False, draw="first").chunks[2] == CONTENT[4096:6144]
    server.stop()
    assert fetch("enwik8", progress=False) == path


@pytest.mark.parametrize("position", [200, 1_500_000, 2_999_000])
def test_damaged_archive_leaves_nothing(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    serve_enwik8(server, monkeypatch, lambda archive: archive[:position] + bytes(50) + archive[position + 50 :])
    with pytest.raises(DatasetError, match="the archive is damaged"):
        fetch("enwik8", f"{server.url}/mirror", progress=False)
    assert fetched_path("enwik8") is None
    assert not (cache / "enwik8.zip").exists()


def test_wrong_content_leaves_nothing(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_enwik8(server, monkeypatch)
    wrong = Remote(**{**vars(REMOTES["enwik8"]), "content_checksum": "sha256:" + "0" * 64})
    monkeypatch.setitem(REMOTES, "enwik8", wrong)
    with pytest.raises(DatasetError, match="wrong checksum of enwik8"):
        fetch("enwik8", f"{server.url}/mirror", progress=False)
    assert names_in(cache) == []


def test_disk_full_while_unpacking(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_enwik8(server, monkeypatch)
    writes = []

    def write(file: io.FileIO, block: bytes) -> None:
        writes.append(block)
        if Path(file.name).name.startswith(".enwik8."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(block)

    with monkeypatch.context() as patch:
        patch.setattr(download_module, "_write", write)
        with pytest.raises(DatasetError, match="the disk is full"):
            fetch("enwik8", f"{server.url}/mirror", progress=False)
    assert fetched_path("enwik8") is None
    n_requests = len(server.log)
    assert fetch("enwik8", f"{server.url}/mirror", progress=False).read_bytes() == CONTENT
    assert len(server.log) == n_requests  # the archive was whole


def test_fetch_librispeech(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import soundfile

    sound = io.BytesIO()
    samples = np.random.default_rng(3).integers(-99, 99, 5000).astype(np.int16)
    soundfile.write(sound, samples, 16_000, format="FLAC", subtype="PCM_16")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name in ("LibriSpeech/dev-clean/1/2/1-2-0.flac", "LibriSpeech/LICENSE.TXT", "../../1-2-1.flac"):
            member = tarfile.TarInfo(name)
            member.size = len(sound.getvalue())
            tar.addfile(member, io.BytesIO(sound.getvalue()))
    content = file.getvalue()
    server.files["/dev-clean.tar.gz"] = content
    md5 = f"md5:{hashlib.md5(content).hexdigest()}"
    small = Remote(REMOTES["librispeech"].url, len(content), 10_000, "librispeech-dev-clean", md5)
    monkeypatch.setitem(REMOTES, "librispeech", small)
    (cache / "librispeech-dev-clean.part").mkdir(parents=True)
    (cache / "librispeech-dev-clean.part" / "torn.flac").write_bytes(b"left by an interrupted run")
    path = fetch("librispeech", server.url, progress=False)
    assert names_in(path) == ["1-2-0.flac", "1-2-1.flac"]
    assert names_in(cache) == ["librispeech-dev-clean"]
    assert len(load_dataset("librispeech", progress=False)) == 8


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 80), np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The set's repository as it was in 2023, in small: one tar of pictures, and files that are not wanted."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:gz") as archive:
        for i in range(3):
            member = tarfile.TarInfo(f"ILSVRC2012_val_0000000{i}_n01440764.JPEG")
            member.size = len(jpeg(i))
            archive.addfile(member, io.BytesIO(jpeg(i)))
    names = {"data/val_images.tar.gz": tar.getvalue(), "data/train_images_0.tar.gz": b"large", "README.md": b"text"}
    siblings = [{"rfilename": name, "size": len(content)} for name, content in names.items()]
    info = {
        "id": "ILSVRC/imagenet-1k",
        "sha": COMMIT,
        "siblings": siblings,
        "tags": [],
        "private": False,
        "downloads": 0,
    }
    tree = [{"type": "file", "path": name, "size": len(content), "oid": COMMIT} for name, content in names.items()]
    server.files[f"/api/datasets/ILSVRC/imagenet-1k/tree/{COMMIT}"] = json.dumps(tree).encode()
    for revision in ("main", COMMIT):
        server.files[f"/api/datasets/ILSVRC/imagenet-1k/revision/{revision}"] = json.dumps(info).encode()
    for name, content in names.items():
        server.files[f"/datasets/ILSVRC/imagenet-1k/resolve/{COMMIT}/{name}"] = content
    monkeypatch.setitem(REMOTES, "imagenet", Remote("", 10_000, 0, "imagenet-val"))
    return server


def test_fetch_imagenet_from_a_hub(hub: Server, cache: Path) -> None:
    path = fetch("imagenet", hub.url, progress=False)
    assert [file.name for file in path.rglob("*") if file.is_file()] == ["val_images.tar.gz"]
    assert names_in(cache) == ["imagenet-val"]
    dataset = load_dataset("imagenet", 6, progress=False)
    assert sorted({source.split()[0] for source in dataset.sources}) == [
        f"ILSVRC2012_val_0000000{i}.JPEG" for i in range(3)
    ]


def test_imagenet_goes_on_after_a_lost_connection(hub: Server, cache: Path) -> None:
    url = f"{hub.url}/datasets/ILSVRC/imagenet-1k/resolve/{COMMIT}/data/val_images.tar.gz"
    whole = hub.files[url.removeprefix(hub.url)]
    hub.cut = [10**6] * 2 + [len(whole) // 2]  # two listings, then the archive
    try:
        path = fetch("imagenet", hub.url, progress=False)
    except DatasetError:
        assert fetched_path("imagenet") is None
        path = fetch("imagenet", hub.url, progress=False)
    assert (path / "data" / "val_images.tar.gz").read_bytes() == whole


def test_imagenet_is_gated(hub: Server, cache: Path) -> None:
    hub.gated = True
    with pytest.raises(DatasetError, match=r"accept its terms at https://huggingface\.co/datasets/ILSVRC/imagenet-1k"):
        fetch("imagenet", hub.url, progress=False)
    assert fetched_path("imagenet") is None


def test_hub_is_gone(hub: Server, cache: Path) -> None:
    hub.stop()
    with pytest.raises(DatasetError, match=r"cannot be reached \(.+\)$"):
        fetch("imagenet", hub.url, progress=False)
    assert fetched_path("imagenet") is None


def test_published_checksums() -> None:
    """As stated by mattmahoney.net/dc/textdata.html and openslr.org/resources/12/md5sum.txt."""
    assert REMOTES["librispeech"].checksum == "md5:42e2234ba48799c1f50f24a7926300a1"
    assert REMOTES["enwik8"].unpacked_bytes == 10**8
    sha256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
    assert REMOTES["enwik8"].content_checksum == f"sha256:{sha256}"


def test_unknown_name(cache: Path) -> None:
    with pytest.raises(
        DatasetError, match="no data set 'cifar' can be fetched; there are enwik8, librispeech, imagenet"
    ):
        fetch("cifar")
