"""A server on 127.0.0.1 with the layout of the Hugging Face hub, and small GPT-NeoX checkpoints of random weights.

API listing with digests, branches, relative redirects for small files, redirects to a CDN path for large ones, ranges,
etags, error codes, and faults on demand (a connection cut after some bytes, other content, a limit of requests, gated
repositories, a server that is down). Nothing of llmcomp here.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
from safetensors.numpy import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SMALL_FILES = (".json", ".txt", ".md")


def byte_tokenizer_json() -> bytes:
    """A byte-level BPE with the 256 byte symbols, five merges and <|endoftext|>: 262 tokens."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("i", "n"), ("e", "r")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer.to_str().encode()


def neox_config(**changes: object) -> dict[str, object]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 272,
        "max_position_embeddings": 128,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 261,
        "eos_token_id": 261,
        **changes,
    }


def neox_tensors(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Random float32 weights of the shapes that `config` asks for, by the names of Hugging Face's GPT-NeoX."""
    rng = np.random.default_rng(seed)
    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]

    def linear(name: str, n_out: int, n_in: int) -> dict[str, np.ndarray]:
        weight = rng.normal(0, n_in**-0.5, (n_out, n_in)).astype(np.float32)
        return {f"{name}.weight": weight, f"{name}.bias": rng.normal(0, 0.02, n_out).astype(np.float32)}

    def norm(name: str) -> dict[str, np.ndarray]:
        bias = rng.normal(0, 0.02, width).astype(np.float32)
        return {f"{name}.weight": np.ones(width, np.float32), f"{name}.bias": bias}

    tensors = {"gpt_neox.embed_in.weight": rng.normal(0, 1, (vocab, width)).astype(np.float32)}
    for layer in range(config["num_hidden_layers"]):
        at = f"gpt_neox.layers.{layer}"
        tensors |= norm(f"{at}.input_layernorm") | norm(f"{at}.post_attention_layernorm")
        tensors |= linear(f"{at}.attention.query_key_value", 3 * width, width)
        tensors |= linear(f"{at}.attention.dense", width, width)
        tensors |= linear(f"{at}.mlp.dense_h_to_4h", inner, width) | linear(f"{at}.mlp.dense_4h_to_h", width, inner)
    tensors |= norm("gpt_neox.final_layer_norm")
    if not config["tie_word_embeddings"]:
        tensors["embed_out.weight"] = rng.normal(0, width**-0.5, (vocab, width)).astype(np.float32)
    return tensors


def neox_files(seed: int, **changes: object) -> dict[str, bytes]:
    """A whole checkpoint as it lies in a repository: config.json, tokenizer.json, model.safetensors."""
    config = neox_config(**changes)
    return {
        "config.json": json.dumps(config).encode(),
        "tokenizer.json": byte_tokenizer_json(),
        "model.safetensors": save(neox_tensors(config, seed), metadata={"format": "pt"}),
    }


def write_checkpoint(folder: Path, seed: int, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in neox_files(seed, **changes).items():
        (folder / name).write_bytes(data)
    return folder


def is_large(name: str) -> bool:
    return not name.endswith(SMALL_FILES)


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """Repositories with revisions, served until `close`; `requests` holds (method, path, range) of what was asked."""

    def __init__(self) -> None:
        # Commits of branches by repository, and files by commit.
        self.branches: dict[str, dict[str, str]] = {}
        self.trees: dict[tuple[str, str], dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.bytes_sent = 0
        self.cut_after_bytes: int | None = None
        self.token: str | None = None
        # Lists can be seen by everybody, files by nobody.
        self.gated: set[str] = set()
        # Statuses that the next requests are answered with, and what large files hold instead of their content.
        self.busy: list[int] = []
        self.corrupt: dict[str, bytes] = {}
        # The CDN is another host on the real hub, so clients stop at the redirect to it and read its headers.
        self.server, self.cdn = self.start(), self.start()

    def start(self) -> http.server.ThreadingHTTPServer:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def cdn_endpoint(self) -> str:
        return f"http://127.0.0.1:{self.cdn.server_address[1]}/cdn"

    def add(self, repo: str, revision: str, files: dict[str, bytes]) -> str:
        """Put a revision up, or other files where it was; the answer is its commit."""
        commit = hashlib.sha1(f"{repo} {revision} {sorted(map(blob_id, files.values()))}".encode()).hexdigest()
        self.branches.setdefault(repo, {})[revision] = commit
        self.trees[repo, commit] = files
        self.blobs |= {hashlib.sha256(data).hexdigest(): data for data in files.values()}
        return commit

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.branches.get(repo, {}).get(revision, revision)
        files = self.trees.get((repo, commit))
        return None if files is None else (commit, files)

    def downloads(self, name: str) -> int:
        """How many times the content of a file was asked for."""
        return sum(1 for method, path, _ in self.requests if method == "GET" and path.endswith(name))

    def close(self) -> None:
        for server in (self.server, self.cdn):
            server.shutdown()
            server.server_close()


# Long: a class of short methods, all of which look into `hub`.
def _handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range")))
            parts = path.strip("/").split("/")
            if hub.busy:
                return self.answer(hub.busy.pop(0), b"{}", {"Retry-After": "0"})
            if parts[0] == "cdn":
                data = hub.corrupt.get(parts[1], hub.blobs[parts[1]])
                return self.send_file(data, {"ETag": f'"{parts[1]}"'})
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.fail(401, "GatedRepo")
            if parts[:2] == ["api", "models"] and parts[4:] == ["refs"]:
                return self.send_branches("/".join(parts[2:4]))
            if parts[:2] == ["api", "models"]:
                return self.send_listing("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
            if parts[:2] == ["api", "resolve-cache"]:
                return self.send_small(parts)
            if len(parts) >= 5 and parts[2] == "resolve" and "/".join(parts[:2]) in hub.gated:
                return self.fail(401, "GatedRepo")
            if len(parts) >= 5 and parts[2] == "resolve":
                return self.send_redirect("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            return self.fail(404, "RepoNotFound")

        def look_up(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
            if repo not in hub.branches:
                self.fail(401 if not hub.token else 404, "RepoNotFound")
                return None
            found = hub.find(repo, revision)
            if found is None:
                self.fail(404, "RevisionNotFound")
            return found

        def send_branches(self, repo: str) -> None:
            if self.look_up(repo, next(iter(hub.branches.get(repo, {"": ""})))) is None:
                return
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                for name, commit in hub.branches[repo].items()
            ]
            refs = {"branches": branches, "converts": [], "tags": []}
            self.send_file(json.dumps(refs).encode(), {"Content-Type": "application/json"})

        def send_listing(self, repo: str, revision: str) -> None:
            found = self.look_up(repo, revision)
            if found is None:
                return
            siblings = []
            for name, data in found[1].items():
                entry = {"rfilename": name, "size": len(data), "blobId": blob_id(data)}
                if is_large(name):
                    entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
                siblings.append(entry)
            info = {"id": repo, "modelId": repo, "sha": found[0], "siblings": siblings, "tags": [], "private": False}
            info["gated"] = "auto" if repo in hub.gated else False
            self.send_file(json.dumps(info).encode(), {"Content-Type": "application/json"})

        def send_redirect(self, repo: str, revision: str, name: str) -> None:
            found = self.look_up(repo, revision)
            if found is None:
                return
            commit, files = found
            if name not in files:
                return self.fail(404, "EntryNotFound", {"X-Repo-Commit": commit})
            headers = {"X-Repo-Commit": commit, "X-Linked-Size": str(len(files[name]))}
            if is_large(name):
                digest = hashlib.sha256(files[name]).hexdigest()
                headers |= {"X-Linked-ETag": f'"{digest}"', "Location": f"{hub.cdn_endpoint}/{digest}/{name}"}
                return self.answer(302, b"", headers)
            headers |= {"X-Linked-ETag": f'"{blob_id(files[name])}"'}
            headers["Location"] = f"/api/resolve-cache/models/{repo}/{commit}/{name}"
            return self.answer(307, b"", headers)

        def send_small(self, parts: list[str]) -> None:
            commit, name = parts[5], "/".join(parts[6:])
            data = hub.find("/".join(parts[3:5]), commit)[1][name]
            self.send_file(data, {"ETag": f'"{blob_id(data)}"', "X-Repo-Commit": commit})

        def send_file(self, data: bytes, headers: dict[str, str]) -> None:
            first = 0
            if asked := self.headers.get("Range"):
                first = int(asked.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            self.answer(206 if first else 200, data[first:], {"Accept-Ranges": "bytes", **headers})

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.cut_after_bytes is not None and len(body) > hub.cut_after_bytes:
                body, hub.cut_after_bytes = body[: hub.cut_after_bytes], None
                self.close_connection = True
            hub.bytes_sent += len(body)
            self.wfile.write(body)

        def fail(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
            self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    return Handler
