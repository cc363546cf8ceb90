"""`gemma-export push`, with a local HTTP server in the hub's place."""

import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from gemma_export.model_card import NOTICE, write_card
from gemma_runtime.bundle import SIGNATURE, Bundle, open_bundle
from tests.local_hub import REPO, Hub, Process, hub_environment, serve_hub, start_python
from tests.runtime.manifests import goldens_of, write_bundle

TINY = Path(__file__).parents[1] / "data" / "tiny"
PUSH = "import sys; from gemma_export.cli import run; sys.exit(run(['push', *sys.argv[1:]]))"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as hub:
        hub.exists = False
        yield hub


@dataclass
class Client:
    home: Path

    def start(self, endpoint: str, *arguments: str, token: str | None = "hf_writer") -> Process:
        environment = hub_environment(endpoint, self.home, token)
        return start_python(PUSH, *arguments, environment=environment)

    def push(
        self, endpoint: str, *arguments: str, bundle: Path = TINY, repo: str = REPO
    ) -> tuple[str, str]:
        process = self.start(endpoint, str(bundle), repo, *arguments)
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        return output, errors

    def refused(
        self,
        endpoint: str,
        *arguments: str,
        bundle: Path = TINY,
        repo: str = REPO,
        token: str | None = "hf_writer",
    ) -> str:
        process = self.start(endpoint, str(bundle), repo, *arguments, token=token)
        output, errors = process.communicate()
        assert process.returncode == 1, output
        lines = [line for line in errors.splitlines() if not line[:1].isdigit()]  # the progress
        assert len(lines) == 1, errors
        return lines[0]


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path / "home")


def test_a_bundle_is_pushed_whole_into_a_private_repository(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    output, _ = client.push(hub.endpoint)
    assert f"{hub.endpoint}/{REPO}/commit/" in output
    assert hub.private
    names = {path.name for path in TINY.iterdir()}
    assert set(hub.files) == names | {"README.md", "NOTICE"}
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert open_bundle(tmp_path).manifest == open_bundle(TINY).manifest


def test_a_push_that_was_cut_off_sends_only_what_is_missing(hub: Hub, client: Client) -> None:
    hub.stall_after = 2
    process = client.start(hub.endpoint, str(TINY), REPO)
    assert hub.stalled.wait(60)
    process.kill()
    process.communicate()
    assert hub.exists
    assert hub.files == {}  # a half bundle is never visible
    arrived = set(hub.uploads)
    assert len(arrived) == 2

    hub.stall_after = None
    hub.requests.clear()
    client.push(hub.endpoint)
    sent = {path.removeprefix("/lfs/") for path in hub.requests if path.startswith("/lfs/")}
    assert sent
    assert not sent & arrived
    assert hub.files["model.onnx.data"] == (TINY / "model.onnx.data").read_bytes()


def test_pushing_the_same_bundle_again_commits_nothing(hub: Hub, client: Client) -> None:
    client.push(hub.endpoint)
    hub.requests.clear()
    client.push(hub.endpoint)
    assert [path for path in hub.requests if path.startswith("/lfs/") or "/commit/" in path] == []


def test_a_bundle_s_signature_is_pushed_with_it(hub: Hub, client: Client, tmp_path: Path) -> None:
    signed = Path(shutil.copytree(TINY, tmp_path / "signed"))
    (signed / SIGNATURE).write_bytes(b"signed")
    (signed / "notes.txt").write_bytes(b"mine")
    client.push(hub.endpoint, bundle=signed)
    assert hub.files[SIGNATURE] == b"signed"
    assert "notes.txt" not in hub.files


def test_public_makes_the_repository_public(hub: Hub, client: Client) -> None:
    client.push(hub.endpoint, "--public")
    assert not hub.private


def test_a_dry_run_prints_card_and_files_and_contacts_nothing(hub: Hub, client: Client) -> None:
    output, _ = client.push(hub.endpoint, "--dry-run")
    assert output.startswith("---\nlicense: gemma\n")
    assert f"private repository {REPO}:" in output
    assert all(path.name in output for path in TINY.iterdir())
    assert hub.requests == []


def test_a_file_that_the_manifest_does_not_list_stays_here(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    (folder / "secret.txt").write_text("mine")
    client.push(hub.endpoint, bundle=folder)
    assert "secret.txt" not in hub.files


def test_a_damaged_bundle_is_refused_before_anything_is_contacted(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    (folder / "recipe.yaml").write_bytes((folder / "recipe.yaml").read_bytes()[::-1])
    assert "was altered" in client.refused(hub.endpoint, bundle=folder)
    assert hub.requests == []


def test_without_a_token_nothing_is_contacted(hub: Hub, client: Client) -> None:
    message = client.refused(hub.endpoint, token=None)
    assert "no token is set; run `hf auth login`" in message
    assert hub.requests == []


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "refused your token"), (403, "may not write to"), (418, "the hub answered 418")],
)
def test_a_refusal_of_the_hub_is_one_line(
    hub: Hub, client: Client, status: int, message: str
) -> None:
    hub.refusal = (status, {})
    assert message in client.refused(hub.endpoint)


def test_an_unreachable_hub_is_one_line(client: Client) -> None:
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{port.getsockname()[1]}"
    assert "check the network, then push again" in client.refused(nobody)


def test_a_repository_that_holds_something_else_is_left_alone(hub: Hub, client: Client) -> None:
    hub.exists, hub.private, hub.files = True, True, {"model.safetensors": b"mine"}
    assert "is not a bundle: it holds model.safetensors" in client.refused(hub.endpoint)
    assert hub.files == {"model.safetensors": b"mine"}


@pytest.mark.parametrize("private", [True, False])
def test_the_visibility_of_a_repository_is_never_a_surprise(
    hub: Hub, client: Client, private: bool
) -> None:
    hub.exists, hub.private = True, private
    message = client.refused(hub.endpoint, *(["--public"] if private else []))
    assert "exists and is " + ("private" if private else "public") in message
    assert hub.files == {}


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "https://huggingface.co/a/b/tree/main"])
def test_a_wrong_name_is_refused(hub: Hub, client: Client, repo: str) -> None:
    assert "expected owner/name" in client.refused(hub.endpoint, repo=repo)
    assert hub.requests == []


def test_the_card_names_its_base_model_only_if_that_is_on_the_hub() -> None:
    tiny = open_bundle(TINY)
    assert "base_model" not in _metadata(tiny)
    model = replace(tiny.manifest.model, id="google/gemma-2-2b-it", revision="c0ffee" * 6 + "cafe")
    metadata = _metadata(Bundle(TINY, replace(tiny.manifest, model=model)))
    assert metadata["base_model"] == "google/gemma-2-2b-it"
    assert metadata["base_model_relation"] == "quantized"


def test_the_card_of_a_hugging_face_folder_names_the_programs_that_load_it() -> None:
    tiny = open_bundle(TINY)
    packages = ("transformers", "optimum", "gptqmodel")  # those of --hf-format gptq
    target = replace(tiny.manifest.target, name="hf", packages=packages)
    bundle = Bundle(TINY, replace(tiny.manifest, target=target))
    assert set(packages) <= set(_metadata(bundle)["tags"])
    assert "pip install transformers optimum gptqmodel\n" in write_card(bundle, REPO)
    assert f"vllm serve {REPO}" in write_card(bundle, REPO)
    assert "gemma-runtime" not in write_card(bundle, REPO)


def test_the_card_names_the_prompt_that_lost_most(tmp_path: Path) -> None:
    """A mean over all of them hides it."""
    goldens = goldens_of({"prose": 0.01, "languages": 0.0712})
    card = write_card(write_bundle(tmp_path / "bundle", goldens=goldens), REPO)
    assert "| Mean KL of the worst prompt, `languages` | 0.0712 nats |" in card
    assert "`gemma-runtime eval` tells it by language" in card


def test_the_card_has_the_licence_and_the_tags_of_the_hub() -> None:
    metadata = _metadata(open_bundle(TINY))
    assert metadata["license"] == "gemma"
    assert {"gemma", "gemma2", "onnx", "int4"} <= set(metadata["tags"])
    assert NOTICE.strip() in write_card(open_bundle(TINY), REPO)


def test_the_card_shows_the_speed_of_this_bundle_only(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    from gemma_runtime.measure.bench import measure

    benchmark = measure([TINY], threads=1, repeats=1, new_tokens=2)
    card = write_card(open_bundle(TINY), REPO, benchmark)
    assert "## Speed" in card
    assert "tokens/s" in card
    other = replace(benchmark.bundles[0], recipe="int8")
    file = tmp_path / "bench.json"

    file.write_bytes(msgspec.json.encode(replace(benchmark, bundles=(other,))))
    message = client.refused(hub.endpoint, "--bench", str(file), "--dry-run")
    assert "measures tiny int8 onnx, expected only tiny int4 onnx" in message


def _metadata(bundle: Bundle) -> dict[str, Any]:
    text = write_card(bundle, REPO)
    metadata: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return metadata


def test_no_name_in_a_manifest_changes_the_card_s_metadata() -> None:
    """The hub reads them: a licence or a base model of one's own would look official."""
    tiny, hostile = open_bundle(TINY), "a\n---\nlicense: mit\nbase_model: other/model\n"
    model = replace(tiny.manifest.model, id=hostile, family=hostile, revision=hostile)
    quantization = replace(tiny.manifest.quantization, recipe=hostile)
    target = replace(tiny.manifest.target, packages=(hostile,))
    manifest = replace(tiny.manifest, model=model, quantization=quantization, target=target)
    metadata = _metadata(Bundle(TINY, manifest))
    assert metadata["license"] == _metadata(tiny)["license"]
    assert metadata["base_model"] == hostile
    assert hostile in metadata["tags"]
