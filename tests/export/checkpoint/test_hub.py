"""Fetching from the hub, tested with a local HTTP server in its place.

huggingface_hub runs in a separate process, because it reads its endpoint, cache folder and offline
setting only once, when imported.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from gemma_export.checkpoint import hub as hub_module
from gemma_export.checkpoint.hub import looks_like_hub_id

REPO = "somebody/tiny-gemma"
COMMIT = "c0ffee" * 6 + "cafe"
FILES = {
    "config.json": b'{"model_type": "gemma2"}',
    "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors": b"first",
    "model-00002-of-00002.safetensors": b"second",
    "model.safetensors.index.json": json.dumps(
        {
            "weight_map": {
                "a": "model-00001-of-00002.safetensors",
                "b": "model-00002-of-00002.safetensors",
            }
        }
    ).encode(),
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"raise SystemExit('code from the hub ran')",
}
# Loads the module from its file: importing its package would import torch, which takes seconds.
FETCH = f"""
import json, sys
from importlib.util import module_from_spec, spec_from_file_location
from gemma_runtime.errors import GemmaError
spec = spec_from_file_location("hub", {hub_module.__file__!r})
sys.modules["hub"] = hub = module_from_spec(spec)
spec.loader.exec_module(hub)
try:
    snapshot = hub.fetch_hub(sys.argv[1], sys.argv[2] or None)
except GemmaError as error:
    print(json.dumps({{"kind": type(error).__name__, "error": str(error)}}))
else:
    print(json.dumps({{"folder": str(snapshot.folder), "revision": snapshot.revision}}))
"""


@dataclass
class Hub:
    """The server's files and refusals, and the requests it received."""

    endpoint: str
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    refusal: tuple[int, dict[str, str]] | None = None  # status and headers
    refuse_only_files: bool = False  # the real hub does this for gated models
    requests: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append(self.path)
        path = self.path.partition("?")[0]
        is_file = not path.startswith("/api/")
        if self.hub.refusal and (is_file or not self.hub.refuse_only_files):
            status, headers = self.hub.refusal
            self._send(status, b"", headers)
        elif is_file:
            self._file(path.removeprefix(f"/{REPO}/resolve/{COMMIT}/"))
        elif path.startswith(f"/api/models/{REPO}/tree/"):
            self._json([_entry(name, data) for name, data in self.hub.files.items()])
        elif path in (f"/api/models/{REPO}/revision/main", f"/api/models/{REPO}"):
            self._json({"id": REPO, "sha": COMMIT, "siblings": []})
        elif path.startswith(f"/api/models/{REPO}/revision/"):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _file(self, name: str) -> None:
        data = self.hub.files[name]
        self._send(200, data, {"ETag": f'"{_blob(data)}"', "X-Repo-Commit": COMMIT})

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _blob(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "oid": _blob(data), "size": len(data)}


@pytest.fixture
def hub() -> Iterator[Hub]:
    class Handler(_Handler):
        pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Handler.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield Handler.hub
        server.shutdown()
        thread.join()


@dataclass
class Client:
    """Runs `fetch_hub` in a process with its own home folder."""

    home: Path

    def fetch(
        self,
        endpoint: str,
        repo: str = REPO,
        revision: str = "",
        token: str | None = None,
        offline: bool = False,
    ) -> dict[str, str]:
        hidden = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        environment |= {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            **({"HF_TOKEN": token} if token else {}),
            **({"HF_HUB_OFFLINE": "1"} if offline else {}),
        }
        command = [sys.executable, "-c", FETCH, repo, revision]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        answer: dict[str, str] = json.loads(done.stdout)
        return answer

    def refused(self, endpoint: str, **options: Any) -> str:
        answer = self.fetch(endpoint, **options)
        assert answer.get("kind") == "HubError", answer
        assert "\n" not in answer["error"]
        return answer["error"]

    @property
    def snapshot(self) -> Path:
        return self.home / "hub" / f"models--{REPO.replace('/', '--')}" / "snapshots" / COMMIT


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path)


@pytest.fixture(scope="module")
def nobody() -> str:
    """An endpoint that refuses connections."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{port.getsockname()[1]}"


def test_only_files_that_an_export_reads_are_fetched_and_only_once(
    hub: Hub, client: Client
) -> None:
    first = client.fetch(hub.endpoint)
    assert first == {"folder": str(client.snapshot), "revision": COMMIT}
    names = {path.name for path in client.snapshot.iterdir()}
    assert names == set(FILES) - {"pytorch_model.bin", "modeling.py"}
    hub.requests.clear()
    assert client.fetch(hub.endpoint) == first
    assert client.fetch(hub.endpoint, offline=True) == first
    assert hub.requests == []


@pytest.mark.parametrize("missing", ["tokenizer.json", "model-00002-of-00002.safetensors"])
def test_a_snapshot_that_lacks_a_file_is_completed(hub: Hub, client: Client, missing: str) -> None:
    """transformers may cache a model without its tokenizer; the bundle then had none."""
    client.fetch(hub.endpoint)
    (client.snapshot / missing).unlink()
    client.fetch(hub.endpoint)
    assert (client.snapshot / missing).read_bytes() == FILES[missing]


def test_a_repository_with_only_pickles_is_refused(hub: Hub, client: Client) -> None:
    hub.files = {name: FILES[name] for name in ("config.json", "pytorch_model.bin")}
    assert "a repository that has them" in client.refused(hub.endpoint)


def test_an_adapter_is_fetched_without_the_model_that_it_needs(
    hub: Hub, client: Client, nobody: str
) -> None:
    names = ("adapter_config.json", "adapter_model.safetensors")
    hub.files = {**dict.fromkeys(names, b"{}"), "adapter_model.bin": b"a pickle"}
    assert client.fetch(hub.endpoint)["folder"] == str(client.snapshot)
    assert sorted(path.name for path in client.snapshot.iterdir()) == sorted(names)
    assert client.fetch(nobody, offline=True)["revision"] == COMMIT


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("only_files", [True, False])
def test_the_error_for_a_gated_model_says_where_to_accept_its_licence(
    hub: Hub, client: Client, status: int, only_files: bool
) -> None:
    hub.refusal, hub.refuse_only_files = (status, {"X-Error-Code": "GatedRepo"}), only_files
    licence = f"accept its licence at https://huggingface.co/{REPO}"
    without_token = client.refused(hub.endpoint)
    assert "is gated" in without_token
    assert licence in without_token
    assert "hf auth login" in without_token
    with_token = client.refused(hub.endpoint, token="hf_somebody")
    assert "is gated" in with_token
    assert licence in with_token
    assert "hf auth login" not in with_token


def test_the_error_without_a_token_says_how_to_log_in(hub: Hub, client: Client) -> None:
    """Without a token, the hub answers 401 to requests for private, gated and missing models."""
    hub.refusal = (401, {})
    assert "run `hf auth login`" in client.refused(hub.endpoint)


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
        (403, {"X-Error-Message": "no access to public gated repositories"}),
    ],
)
def test_a_rejected_token_gives_an_error_of_its_own(
    hub: Hub, client: Client, status: int, headers: dict[str, str]
) -> None:
    hub.refusal = (status, headers)
    message = client.refused(hub.endpoint, token="hf_expired")
    assert f"refused your token for {REPO} ({status})" in message


def test_the_error_for_an_unknown_repository_names_it(hub: Hub, client: Client) -> None:
    assert "somebody/no-such does not exist" in client.refused(
        hub.endpoint, repo="somebody/no-such"
    )


def test_the_error_for_an_unknown_revision_names_it(hub: Hub, client: Client) -> None:
    assert "no revision 'v9'" in client.refused(hub.endpoint, revision="v9")


def test_an_unexpected_status_of_the_hub_is_reported(hub: Hub, client: Client) -> None:
    hub.refusal = (418, {})
    assert f"the hub answered 418 for {REPO}" in client.refused(hub.endpoint)


def test_the_error_for_an_unreachable_hub_suggests_a_local_checkpoint(
    client: Client, nobody: str
) -> None:
    message = client.refused(nobody)
    assert f"can't fetch {REPO}" in message
    assert "--checkpoint DIR" in message


def test_the_error_in_offline_mode_names_the_variable_that_sets_it(
    client: Client, nobody: str
) -> None:
    message = client.refused(nobody, offline=True)
    assert "HF_HUB_OFFLINE" in message
    assert "--checkpoint DIR" in message


def test_an_incomplete_snapshot_is_not_used_offline(hub: Hub, client: Client, nobody: str) -> None:
    client.fetch(hub.endpoint)
    (client.snapshot / "model-00002-of-00002.safetensors").unlink()
    assert "HF_HUB_OFFLINE" in client.refused(nobody, offline=True)
    assert "--checkpoint DIR" in client.refused(nobody)


@pytest.mark.parametrize("text", ["google/gemma-2-2b-it", "a/b", "some.body/my_model-1.5"])
def test_hub_ids_are_recognized(text: str) -> None:
    assert looks_like_hub_id(text)


@pytest.mark.parametrize(
    "text",
    [
        "gemma",
        "./a",
        "../a/b",
        "/a/b",
        "a/b/c",
        "a/b.gguf",
        "a//b",
        "~/a",
        "a/..",
        "a/b c",
        "",
        "C:/a",
    ],
)
def test_paths_are_not_hub_ids(text: str) -> None:
    assert not looks_like_hub_id(text)
