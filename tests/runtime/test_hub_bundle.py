"""Bundles given as `hub:OWNER/NAME`, fetched from a local HTTP server in the hub's place."""

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("huggingface_hub")

from gemma_runtime.bundle import SIGNATURE
from gemma_runtime.errors import HubError
from gemma_runtime.hub import HubName, bundle_name, list_files
from tests.local_hub import (
    COMMIT,
    REPO,
    Hub,
    hub_environment,
    serve_hub,
    snapshot_folder,
    start_python,
)

TINY = Path(__file__).parents[1] / "data" / "tiny"
RUN = "import sys; from gemma_runtime.cli import main; main()"


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in TINY.iterdir()}
    with serve_hub({**files, "README.md": b"not in the manifest"}) as hub:
        yield hub


@dataclass
class Client:
    home: Path

    def run(self, endpoint: str, *arguments: str, offline: bool = False) -> tuple[int, str, str]:
        environment = hub_environment(endpoint, self.home, offline=offline)
        process = start_python(RUN, *arguments, environment=environment)
        output, errors = process.communicate()
        return process.returncode, output, errors

    def refused(self, endpoint: str, bundle: str, offline: bool = False) -> str:
        code, _, errors = self.run(endpoint, "inspect", bundle, offline=offline)
        assert code == 1
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
        return errors


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path / "home")


def test_a_bundle_is_downloaded_once_checked_and_run(hub: Hub, client: Client) -> None:
    run = ("run", f"hub:{REPO}", "the", "--max-new-tokens", "2", "--threads", "1", "--json")
    code, output, errors = client.run(hub.endpoint, *run)
    assert code == 0, errors
    assert json.loads(output)["new_tokens"] == 2
    folder = snapshot_folder(client.home)
    assert {path.name for path in folder.iterdir()} == {path.name for path in TINY.iterdir()}
    assert all(path.is_symlink() for path in folder.iterdir())

    hub.requests.clear()
    assert client.run(hub.endpoint, *run)[0] == 0
    assert client.run(hub.endpoint, *run, offline=True)[0] == 0
    code, output, errors = client.run(hub.endpoint, "verify", str(folder), "--threads", "1")
    assert "PASS" in output, errors
    assert hub.requests == []


def test_a_signature_is_downloaded_with_the_bundle(hub: Hub, client: Client) -> None:
    hub.files[SIGNATURE] = b"signed"
    assert client.run(hub.endpoint, "inspect", f"hub:{REPO}")[0] == 0
    assert (snapshot_folder(client.home) / SIGNATURE).read_bytes() == b"signed"


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_a_revision_is_downloaded(hub: Hub, client: Client, revision: str) -> None:
    assert client.run(hub.endpoint, "inspect", f"hub:{REPO}@{revision}")[0] == 0
    assert f"/api/models/{REPO}/revision/{revision}" in hub.requests


def test_a_file_missing_in_the_cache_is_downloaded_again(hub: Hub, client: Client) -> None:
    client.run(hub.endpoint, "inspect", f"hub:{REPO}")
    (snapshot_folder(client.home) / "model.onnx").unlink()
    assert client.run(hub.endpoint, "inspect", f"hub:{REPO}")[0] == 0


def test_a_file_altered_on_the_hub_is_refused(hub: Hub, client: Client) -> None:
    hub.files["recipe.yaml"] = hub.files["recipe.yaml"][::-1]
    assert "recipe.yaml was altered" in client.refused(hub.endpoint, f"hub:{REPO}")


def test_a_repository_without_a_manifest_is_refused(hub: Hub, client: Client) -> None:
    del hub.files["manifest.json"]
    assert "is not a bundle" in client.refused(hub.endpoint, f"hub:{REPO}")


@pytest.mark.parametrize(
    ("bundle", "message"),
    [
        ("hub:nobody/nothing", "nobody/nothing does not exist on the hub"),
        (f"hub:{REPO}@v9", "has no revision 'v9'"),
        ("hub:tiny", "expected hub:owner/name"),
        ("hub:../../tiny", "expected hub:owner/name"),
    ],
)
def test_a_wrong_name_is_one_line(hub: Hub, client: Client, bundle: str, message: str) -> None:
    assert message in client.refused(hub.endpoint, bundle)


def test_an_unreachable_hub_is_one_line(client: Client) -> None:
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{port.getsockname()[1]}"
    assert f"can't fetch {REPO}" in client.refused(nobody, f"hub:{REPO}")
    assert "HF_HUB_OFFLINE" in client.refused(nobody, f"hub:{REPO}", offline=True)


def test_names_that_lead_out_of_a_repository_are_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hub may answer anything, and its names become paths."""
    names = ["model.gguf", "a/b.gguf", "../c.gguf", "/d.gguf", "a/../../e.gguf", "..\\f.gguf"]
    answer = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: answer)
    assert list_files(REPO, None, "") == ["model.gguf", "a/b.gguf"]


def test_nothing_is_contacted_without_the_prefix(hub: Hub, client: Client) -> None:
    assert "is not a bundle" in client.refused(hub.endpoint, REPO)
    assert hub.requests == []


def test_progress_goes_to_stderr(hub: Hub, client: Client) -> None:
    environment = hub_environment(hub.endpoint, client.home)
    del environment["HF_HUB_DISABLE_PROGRESS_BARS"]
    process = start_python(RUN, "inspect", f"hub:{REPO}", "--json", environment=environment)
    output, errors = process.communicate()
    assert json.loads(output)
    assert "Fetching" in errors or "Download" in errors


def test_addresses_mean_what_they_mean_in_the_phone_apps() -> None:
    """The apps read the same file."""
    for case in json.loads((TINY.parent / "hub_names.json").read_text("utf-8")):
        if case["repository"] is None:
            with pytest.raises(HubError, match="hub"):
                bundle_name(case["text"])
        else:
            assert bundle_name(case["text"]) == HubName(case["repository"], case["revision"])
