"""Fetching checkpoints from the hub, tested with a local HTTP server in its place."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gemma_export.checkpoint import hub as hub_module
from gemma_runtime.errors import HubError
from gemma_runtime.hub import HubName, looks_like_hub_id, parse_hub_name
from tests.local_hub import COMMIT, REPO, Hub, hub_environment, serve_hub, snapshot_folder

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
    snapshot = hub.fetch_hub(sys.argv[1], sys.argv[2] or None, sys.argv[3])
except GemmaError as error:
    print(json.dumps({{"kind": type(error).__name__, "error": str(error)}}))
else:
    answer = {{"folder": str(snapshot.folder), "revision": snapshot.revision}}
    print(json.dumps(answer | ({{"gguf": snapshot.gguf}} if snapshot.gguf else {{}})))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub(FILES) as hub:
        yield hub


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
        pattern: str = "",
    ) -> dict[str, str]:
        environment = hub_environment(endpoint, self.home, token, offline)
        command = [sys.executable, "-c", FETCH, repo, revision, pattern]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        answer: dict[str, str] = json.loads(done.stdout)
        return answer

    def refused(self, endpoint: str, kind: str = "HubError", **options: Any) -> str:
        answer = self.fetch(endpoint, **options)
        assert answer.get("kind") == kind, answer
        assert "\n" not in answer["error"]
        return answer["error"]

    @property
    def snapshot(self) -> Path:
        return snapshot_folder(self.home)


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


GGUFS = {
    "README.md": b"",
    "tiny-Q4_0.gguf": b"GGUF four",
    "tiny-Q8_0-00001-of-00002.gguf": b"GGUF eight, first",
    "tiny-Q8_0-00002-of-00002.gguf": b"GGUF eight, second",
    "mmproj-F16.gguf": b"GGUF vision",
}


def test_a_pattern_fetches_one_gguf_model_with_its_parts_and_only_once(
    hub: Hub, client: Client
) -> None:
    hub.files = GGUFS
    first = client.fetch(hub.endpoint, pattern="q8_0")
    assert first["gguf"] == "tiny-Q8_0-00001-of-00002.gguf"
    names = {path.name for path in client.snapshot.iterdir()}
    assert names == {name for name in GGUFS if "Q8_0" in name}
    hub.requests.clear()
    assert client.fetch(hub.endpoint, pattern="q8_0") == first
    assert client.fetch(hub.endpoint, pattern="q8_0", offline=True) == first
    assert hub.requests == []


def test_without_a_pattern_a_repository_of_several_gguf_models_is_a_question(
    hub: Hub, client: Client
) -> None:
    hub.files = GGUFS
    question = client.refused(hub.endpoint, "CheckpointError")
    assert "has 2 GGUF models: tiny-Q4_0.gguf, tiny-Q8_0-00001-of-00002.gguf" in question
    assert f"--checkpoint {REPO}:PATTERN" in question
    hub.files = {name: GGUFS[name] for name in ("README.md", "tiny-Q4_0.gguf", "mmproj-F16.gguf")}
    assert client.fetch(hub.endpoint)["gguf"] == "tiny-Q4_0.gguf"


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


@pytest.mark.parametrize(
    ("text", "revision"),
    [
        ("a/b", None),
        ("https://huggingface.co/a/b", None),
        ("http://www.huggingface.co/a/b/", None),
        ("huggingface.co/a/b?library=transformers#usage", None),
        ("hf.co/a/b", None),
        ("https://hf.co/a/b/tree/main", "main"),
        ("https://huggingface.co/a/b/tree/refs/pr/1", "refs/pr/1"),
        ("https://huggingface.co/a/b/tree/refs%2Fpr%2F1", "refs/pr/1"),
    ],
)
def test_the_page_of_a_model_is_read_as_its_id_and_revision(
    text: str, revision: str | None
) -> None:
    assert parse_hub_name(text) == HubName("a/b", revision)


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "a",
        "datasets/a/b",
        "spaces/a/b",
        "a/b/blob/main/model.gguf",
        "a/b/resolve/main/model.gguf",
        "a/b/tree/main/folder",
        "a/b/tree",
        "a/b/discussions",
    ],
)
def test_another_page_of_the_hub_is_refused(rest: str) -> None:
    with pytest.raises(HubError, match="is not the page of a model"):
        parse_hub_name(f"https://huggingface.co/{rest}")


def test_a_page_of_another_site_is_not_a_hub_name() -> None:
    assert parse_hub_name("https://example.com/a/b") is None


def test_a_revision_of_a_checkpoint_is_fetched(hub: Hub, client: Client) -> None:
    assert client.fetch(hub.endpoint, revision="v1")["revision"] == COMMIT
    assert f"/api/models/{REPO}/revision/v1" in hub.requests


def test_modules_of_an_encoder_are_fetched_also_if_transformers_left_them_out(
    tmp_path: Path,
) -> None:
    encoder = {"model_type": "gemma3_text", "use_bidirectional_attention": True}
    shape = dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"), 8
    )
    files = {
        "config.json": json.dumps({**encoder, **shape}).encode(),
        "tokenizer.json": b"{}",
        "model.safetensors": b"weights",
        "modules.json": b"[]",
        "config_sentence_transformers.json": b"{}",
        "sentence_bert_config.json": b"{}",
        "1_Pooling/config.json": b"{}",
        "2_Dense/config.json": b"{}",
        "2_Dense/model.safetensors": b"dense",
        "2_Dense/pytorch_model.bin": b"a pickle",
    }
    client = Client(tmp_path)
    with serve_hub(files) as hub:
        client.fetch(hub.endpoint)
        fetched = {path.relative_to(client.snapshot).as_posix() for path in _files(client.snapshot)}
        assert fetched == set(files) - {"2_Dense/pytorch_model.bin"}
        (client.snapshot / "modules.json").unlink()
        client.fetch(hub.endpoint)
        assert (client.snapshot / "modules.json").exists()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir())
