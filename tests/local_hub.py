"""A local HTTP server that speaks the hub's protocol, as far as huggingface_hub needs it here.

huggingface_hub runs in a separate process, because it reads its endpoint, cache folder and offline
setting only once, when imported.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import unquote

REPO = "somebody/tiny-gemma"
COMMIT = "c0ffee" * 6 + "cafe"


@dataclass
class Hub:
    """The server's files and refusals, and the requests it received."""

    endpoint: str
    files: dict[str, bytes] = field(default_factory=dict)
    exists: bool = True  # REPO, the only repository
    private: bool = False
    refusal: tuple[int, dict[str, str]] | None = None  # status and headers
    refuse_only_files: bool = False  # the real hub does this for gated models
    requests: list[str] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)  # stored by digest, not yet committed
    stall_after: int | None = None  # number of uploads; the next one gets no answer
    stalled: Event = field(default_factory=Event)
    released: Event = field(default_factory=Event)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append(self.path)
        path = unquote(self.path.partition("?")[0])
        is_file = not path.startswith("/api/")
        if self.hub.refusal and (is_file or not self.hub.refuse_only_files):
            status, headers = self.hub.refusal
            self._send(status, b"", headers)
        elif not self.hub.exists:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif is_file:
            self._file(path)
        elif path.startswith(f"/api/models/{REPO}/tree/"):
            self._json([_entry(name, data) for name, data in self.hub.files.items()])
        elif path in _info_paths():
            siblings = [{"rfilename": name} for name in self.hub.files]
            info = {"id": REPO, "sha": COMMIT, "siblings": siblings, "private": self.hub.private}
            self._json(info)
        elif path.startswith(f"/api/models/{REPO}/revision/"):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        self.hub.requests.append(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.hub.refusal:
            self._send(self.hub.refusal[0], b"{}", self.hub.refusal[1])
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.path == f"/api/models/{REPO}/preupload/main":
            self._json({"files": [self._mode(file) for file in json.loads(body)["files"]]})
        elif self.path == f"/{REPO}.git/info/lfs/objects/batch":
            self._json({"objects": [self._action(each) for each in json.loads(body)["objects"]]})
        elif self.path == f"/api/models/{REPO}/commit/main":
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def do_PUT(self) -> None:
        self.hub.requests.append(self.path)
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.hub.stall_after == len(self.hub.uploads):
            self.hub.stalled.set()
            self.hub.released.wait()
            return
        digest = self.path.removeprefix("/lfs/")
        assert hashlib.sha256(data).hexdigest() == digest
        self.hub.uploads[digest] = data
        self._send(200, b"", {})

    def _create(self, wanted: dict[str, Any]) -> None:
        assert f"{wanted['organization']}/{wanted['name']}" == REPO
        status = 409 if self.hub.exists else 200
        if not self.hub.exists:
            self.hub.exists, self.hub.private = True, wanted["visibility"] == "private"
        body = json.dumps({"url": f"{self.hub.endpoint}/{REPO}"}).encode()
        self._send(status, body, {"Content-Type": "application/json"})

    def _mode(self, file: dict[str, Any]) -> dict[str, object]:
        """Big files and binary ones are LFS files on the hub."""
        is_lfs = file["path"].endswith((".onnx", ".data", ".gtok"))
        old = self.hub.files.get(file["path"])
        return {
            "path": file["path"],
            "uploadMode": "lfs" if is_lfs else "regular",
            "shouldIgnore": False,
            "oid": None if old is None else _sha256(old) if is_lfs else _blob(old),
        }

    def _action(self, wanted: dict[str, Any]) -> dict[str, object]:
        about = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in self.hub.uploads:
            return about
        href = f"{self.hub.endpoint}/lfs/{wanted['oid']}"
        return {**about, "actions": {"upload": {"href": href}}}

    def _commit(self, operations: list[dict[str, Any]]) -> None:
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                self.hub.files[value["path"]] = self.hub.uploads[value["oid"]]
        url = f"{self.hub.endpoint}/{REPO}/commit/{COMMIT}"
        self._json({"commitUrl": url, "commitOid": COMMIT})

    def _file(self, path: str) -> None:
        repo_id, _, rest = path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repo_id != REPO:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", "v1", COMMIT):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif name not in self.hub.files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
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


def _info_paths() -> set[str]:
    api = f"/api/models/{REPO}"
    return {api, f"{api}/revision/main", f"{api}/revision/v1", f"{api}/revision/{COMMIT}"}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _blob(data: bytes) -> str:
    """Git's digest of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "oid": _blob(data), "size": len(data)}


@contextmanager
def serve_hub(files: Mapping[str, bytes] | None = None) -> Iterator[Hub]:
    """A hub with these files in REPO."""

    class Handler(_Handler):
        pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Handler.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}", dict(files or {}))
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield Handler.hub
        Handler.hub.released.set()
        server.shutdown()
        thread.join()


def hub_environment(
    endpoint: str, home: Path, token: str | None = None, offline: bool = False
) -> dict[str, str]:
    """Environment of a process that uses this hub and a Hugging Face folder of its own."""
    hidden = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    return environment | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",  # the server takes uploads by the LFS protocol
        "NO_PROXY": "127.0.0.1",
        **({"HF_TOKEN": token} if token else {}),
        **({"HF_HUB_OFFLINE": "1"} if offline else {}),
    }


def snapshot_folder(home: Path) -> Path:
    return home / "hub" / f"models--{REPO.replace('/', '--')}" / "snapshots" / COMMIT


def start_python(code: str, *arguments: str, environment: Mapping[str, str]) -> "Process":
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


Process = subprocess.Popen[str]
