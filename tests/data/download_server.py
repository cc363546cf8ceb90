"""A hub that misbehaves, for downloads of the phone apps. It serves the tiny bundle on 127.0.0.1.

    python -m tests.data.download_server        # prints its port, then serves until it is ended

The repository's name says what goes wrong. Owners are free, so that every test meets a repository
for the first time. `/log/OWNER/NAME` lists the requests for its files.
"""

import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

TINY = Path(__file__).parent / "tiny"
COMMIT = "c0ffee" * 6 + "cafe"
_LARGE = "model.onnx.data"
_PIECE = 100_000  # bytes that a connection lasts where it is cut
_OTHER_NAMES = {
    "escape": "../evil.txt",
    "absolute": "/evil.txt",
    "backslash": "a\\evil.txt",
    "manifest": "MANIFEST.json",
    "long": "x" * 300,
    "case": "GOLDENS.json",
}

_logs: dict[str, list[dict[str, str | None]]] = defaultdict(list)
_lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/log/"):
            return self._send(200, json.dumps(_logs[self.path[5:]]).encode())
        place, _, file = unquote(self.path).partition("/resolve/")
        repository = place[1:]
        fault = repository.partition("/")[2]
        revision, _, name = file.partition("/")
        times = self._note(repository, revision, name)
        data = _content(fault, name)
        if data is None or revision not in ("main", COMMIT):
            return self._send(404, b"")
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": COMMIT}
        act = _FAULTS.get(fault)
        if name == _LARGE and act is not None:
            act(self, data, headers, times)
        elif fault == "gated":
            self._send(401, b"")
        elif fault == "busy" and times < 3:
            self._send(503, b"")
        elif fault == "endless" and name == "manifest.json":
            self._send(200, b" " * (17 << 20), headers)
        else:
            self._ranged(data, headers)

    def redirect(self, data: bytes, headers: dict[str, str], host: str, scheme: str) -> None:
        if self.headers["Host"].startswith(host):
            return self._ranged(data, headers)
        _, port = self.connection.getsockname()
        target = f"{scheme}://{host}:{port}{self.path}"
        self._send(302, b"", {**headers, "Location": target})

    def cut(self, data: bytes, headers: dict[str, str], times: int) -> None:
        self._ranged(data, headers, _PIECE)

    def change(self, data: bytes, headers: dict[str, str], times: int) -> None:
        """Cut once; then the file has another version, so no range of the old one is sent."""
        self._ranged(data, {**headers, "ETag": f'"{times > 1}"'}, _PIECE if times == 1 else None)

    def lie(self, data: bytes, headers: dict[str, str], times: int) -> None:
        """Cut once; then the answer to a range is another range, and then all is well."""
        if times != 2:
            return self._ranged(data, headers, _PIECE if times == 1 else None)
        about = {"Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}"}
        self._send(206, data, {**headers, **about})

    def weaken(self, data: bytes, headers: dict[str, str], times: int) -> None:
        """Cut once, without a version that a range could refer to."""
        headers = {"ETag": 'W/"1"'}
        self._ranged(data, headers, _PIECE if times == 1 else None)

    def refuse_range(self, data: bytes, headers: dict[str, str], times: int) -> None:
        if self.headers["Range"]:
            return self._send(416, b"")
        self._ranged(data, headers, _PIECE if times == 1 else None)

    def lengthen(self, data: bytes, headers: dict[str, str], times: int) -> None:
        self._send(200, data + b"more", headers)

    def shorten(self, data: bytes, headers: dict[str, str], times: int) -> None:
        self._send(200, data[:-1], headers)

    def flood(self, data: bytes, headers: dict[str, str], times: int) -> None:
        """Without a length, and larger than the manifest says."""
        self._send(200, data + b"more", headers, length=None)

    def stall(self, data: bytes, headers: dict[str, str], times: int) -> None:
        """A piece, and then nothing; the rest of a file ends in the same way."""
        self._ranged(data, headers, _PIECE)
        threading.Event().wait(30)

    def fail(self, data: bytes, headers: dict[str, str], times: int) -> None:
        self._send(200, b"", headers, length=len(data))

    def compress(self, data: bytes, headers: dict[str, str], times: int) -> None:
        self._send(200, data, {**headers, "Content-Encoding": "gzip"})

    def loop(self, data: bytes, headers: dict[str, str], times: int) -> None:
        self._send(302, b"", {"Location": self.path})

    def elsewhere(self, data: bytes, headers: dict[str, str], times: int) -> None:
        self.redirect(data, headers, "localhost", "http")

    def plain(self, data: bytes, headers: dict[str, str], times: int) -> None:
        self.redirect(data, headers, "127.0.0.2", "http")

    def file_url(self, data: bytes, headers: dict[str, str], times: int) -> None:
        self._send(302, b"", {"Location": "file:///etc/passwd"})

    def _note(self, repository: str, revision: str, name: str) -> int:
        """Log a request; returns how many there were for this file."""
        kept = ("Range", "If-Range", "User-Agent", "Cookie", "Authorization", "Accept-Language")
        request = {"revision": revision, "name": name, **{key: self.headers[key] for key in kept}}
        with _lock:
            _logs[repository].append(request)
            return sum(one["name"] == name for one in _logs[repository])

    def _ranged(self, data: bytes, headers: dict[str, str], most: int | None = None) -> None:
        """The file, or the end of it that was asked for, of which `most` bytes are sent."""
        start, status = 0, 200
        if self.headers["Range"] and self.headers["If-Range"] in (None, headers["ETag"]):
            start, status = int(self.headers["Range"][len("bytes=") : -1]), 206
            headers = {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        end = len(data) if most is None else start + most
        self._send(status, data[start:end], headers, length=len(data) - start)

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        length: int | None = -1,
    ) -> None:
        """`length` is what the answer says of itself: the body's if negative, nothing if None."""
        self.close_connection = True
        self.send_response(status)
        for key, value in {"Connection": "close", "Set-Cookie": "a=b", **(headers or {})}.items():
            self.send_header(key, value)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        with suppress(ConnectionError):  # the app has stopped
            self.wfile.write(body)
            self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        pass


_Act = Callable[[_Handler, bytes, dict[str, str], int], None]
_FAULTS: dict[str, _Act] = {
    "cut": _Handler.cut,
    "changed": _Handler.change,
    "lying": _Handler.lie,
    "weak": _Handler.weaken,
    "rangeless": _Handler.refuse_range,
    "longer": _Handler.lengthen,
    "shorter": _Handler.shorten,
    "flood": _Handler.flood,
    "stalled": _Handler.stall,
    "failing": _Handler.fail,
    "compressed": _Handler.compress,
    "loop": _Handler.loop,
    "elsewhere": _Handler.elsewhere,
    "plain": _Handler.plain,
    "local-file": _Handler.file_url,
}


def _content(fault: str, name: str) -> bytes | None:
    if name == "manifest.json":
        return _manifest(fault)
    path = TINY / name
    if not path.is_file():
        return None
    data = path.read_bytes()
    return data[:-1] + b"#" if fault == "altered" and name == _LARGE else data


def _manifest(fault: str) -> bytes:
    manifest = json.loads((TINY / "manifest.json").read_bytes())
    goldens = manifest["files"]["goldens.json"]
    if fault in _OTHER_NAMES:
        manifest["files"][_OTHER_NAMES[fault]] = goldens
    if fault == "vast":
        goldens["bytes"] = 10**15
    if fault == "many":
        manifest["files"].update({f"file{index}": goldens for index in range(1001)})
    return json.dumps(manifest).encode()


def main() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads = True
        print(server.server_address[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
