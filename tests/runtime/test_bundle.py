import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gemma_runtime.bundle import MANIFEST, describe_files, open_bundle, sha256_file, staged_folder
from gemma_runtime.errors import BundleError
from tests.runtime.manifests import ARTIFACT, write_bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle").directory


def test_an_intact_bundle_opens(folder: Path) -> None:
    bundle = open_bundle(folder)

    assert set(bundle.manifest.files) == {ARTIFACT, "goldens.json"}
    assert bundle.path("goldens") == folder / "goldens.json"


def test_the_error_for_a_missing_role_lists_the_existing_ones(folder: Path) -> None:
    with pytest.raises(BundleError, match="has no tokenizer; it has: goldens"):
        open_bundle(folder).path("tokenizer")


def _remove(folder: Path) -> None:
    (folder / ARTIFACT).unlink()


def _alter(folder: Path) -> None:
    (folder / ARTIFACT).write_bytes(b"Artifact")


def _truncate(folder: Path) -> None:
    (folder / ARTIFACT).write_bytes(b"artifac")


def _lengthen(folder: Path) -> None:
    (folder / ARTIFACT).write_bytes(b"artifacts")


def _make_folder(folder: Path) -> None:
    (folder / ARTIFACT).unlink()
    (folder / ARTIFACT).mkdir()


def _link_outside(folder: Path) -> None:
    outside = folder.parent / "outside"
    (folder / ARTIFACT).rename(outside)
    (folder / ARTIFACT).symlink_to(outside)


def _link_to_itself(folder: Path) -> None:
    (folder / ARTIFACT).unlink()
    (folder / ARTIFACT).symlink_to(folder / ARTIFACT)


def _remove_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def _damage_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"\x00garbage")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove, "is missing"),
        (_alter, "was altered"),
        (_truncate, "has 7 bytes, the manifest says 8"),
        (_lengthen, "has 9 bytes, the manifest says 8"),
        (_make_folder, "is missing"),
        (_link_outside, "leaves the bundle"),
        (_link_to_itself, r"can't be read|is missing"),  # the latter from Python 3.13 on
        (_remove_manifest, "is not a bundle"),
        (_damage_manifest, "not a manifest"),
    ],
)
def test_a_damaged_bundle_is_refused(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)

    with pytest.raises(BundleError, match=message):
        open_bundle(folder)


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "..\\outside", "/etc/hostname"])
def test_a_path_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_bytes(b"artifact")
    _rename_in_manifest(folder, name)

    with pytest.raises(BundleError, match="outside the bundle"):
        open_bundle(folder)


@pytest.mark.parametrize("name", ["", ".", "a\0b", "n" * 5000], ids=["empty", "dot", "nul", "long"])
def test_an_impossible_file_name_is_refused(folder: Path, name: str) -> None:
    """A NUL raised ValueError, a name that is too long OSError."""
    _rename_in_manifest(folder, name)

    with pytest.raises(BundleError):
        open_bundle(folder)


def test_a_link_within_the_folder_is_accepted(folder: Path) -> None:
    (folder / ARTIFACT).rename(folder / "elsewhere")
    (folder / ARTIFACT).symlink_to("elsewhere")

    assert open_bundle(folder).directory == folder


@pytest.fixture
def cached(folder: Path, tmp_path: Path) -> Path:
    """The bundle as Hugging Face's cache holds it: links to files named by their digests."""
    repository = tmp_path / "hub" / "models--somebody--tiny"
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_a_bundle_in_the_cache_of_the_hub_is_opened(cached: Path, tmp_path: Path) -> None:
    assert open_bundle(cached).directory == cached
    (tmp_path / "link").symlink_to(cached)
    assert open_bundle(tmp_path / "link").manifest == open_bundle(cached).manifest


@pytest.mark.parametrize(
    "target",
    [
        "../../artifact",
        "../../refs/artifact",
        "../../blobs/folder/artifact",
        "../other/artifact",
        "../../../models--somebody--other/blobs/artifact",
        "../../../blobs/artifact",
        "../../blobs/link",
    ],
)
def test_a_link_in_the_cache_that_leaves_its_blobs_is_refused(cached: Path, target: str) -> None:
    blobs = cached.parent.parent / "blobs"
    (blobs / "link").symlink_to(cached.parent.parent / "elsewhere")
    place = cached / target if target != "../../blobs/link" else blobs.parent / "elsewhere"
    place = Path(os.path.normpath(place))
    place.parent.mkdir(parents=True, exist_ok=True)
    (cached / ARTIFACT).resolve().rename(place)
    (cached / ARTIFACT).unlink()
    (cached / ARTIFACT).symlink_to(target)

    with pytest.raises(BundleError, match="leaves the bundle"):
        open_bundle(cached)


@pytest.mark.parametrize(("old", "new"), [("snapshots", "copies"), ("models--somebody--tiny", "x")])
def test_links_to_blobs_are_accepted_in_the_cache_alone(cached: Path, old: str, new: str) -> None:
    moved = Path(str(cached).replace(old, new))
    place = next(path for path in (cached, *cached.parents) if path.name == old)
    place.rename(place.with_name(new))

    with pytest.raises(BundleError, match="leaves the bundle"):
        open_bundle(moved)


@pytest.mark.parametrize("field", ["graphs", "roles"])
def test_a_used_file_without_a_digest_is_refused(folder: Path, field: str) -> None:
    (folder / "other").write_bytes(b"")
    fields = json.loads((folder / MANIFEST).read_bytes())
    if field == "graphs":
        fields["graphs"]["decode"][0]["file"] = "other"
    else:
        fields["roles"]["goldens"] = "other"
    (folder / MANIFEST).write_text(json.dumps(fields))

    with pytest.raises(BundleError, match="uses other but has no digest"):
        open_bundle(folder)


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A bundle, with the test running as a user other than root, who could read everything."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_bundle(Path(name) / "bundle").directory
        os.chmod(name, 0o755)
        os.chmod(folder, 0o755)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        yield folder
        os.seteuid(user)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="no seteuid on this system")
def test_a_file_without_read_permission_is_refused(unprivileged: Path) -> None:
    """PermissionError was raised instead."""
    user = os.geteuid()
    os.seteuid(os.getuid())
    (unprivileged / ARTIFACT).chmod(0)
    os.seteuid(user)

    with pytest.raises(BundleError, match=r"model\.onnx can't be read: Permission denied"):
        open_bundle(unprivileged)


def test_files_are_described_by_posix_path_without_the_manifest(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / MANIFEST).write_bytes(b"not the manifest")

    files = describe_files(folder)

    assert set(files) == {ARTIFACT, "goldens.json", f"sub/{MANIFEST}"}
    assert files[ARTIFACT].bytes == 8
    assert files[ARTIFACT].sha256 == sha256_file(folder / ARTIFACT)


def test_a_filled_folder_appears_only_when_complete(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "bundle"

    with staged_folder(output) as stage:
        write_bundle(stage)
        assert not output.exists()

    assert open_bundle(output)
    assert _names(output.parent) == ["bundle"]


def test_an_existing_output_is_refused_before_the_block(folder: Path) -> None:
    with pytest.raises(BundleError, match="exists; give another --output, or --force"):
        _write_and_fail(folder, force=False)

    assert open_bundle(folder)


def test_force_replaces_a_bundle_in_the_last_step(folder: Path) -> None:
    with staged_folder(folder, force=True) as stage:
        write_bundle(stage, codes_digest="f" * 64)
        assert open_bundle(folder).manifest.quantization.codes_digest == "0" * 64

    assert open_bundle(folder).manifest.quantization.codes_digest == "f" * 64
    assert _names(folder.parent) == ["bundle"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_force_does_not_replace_anything_but_a_bundle(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "photos"
    if kind == "folder":
        output.mkdir()
        (output / "holiday").write_bytes(b"dear")
    else:
        output.write_bytes(b"dear")

    with pytest.raises(BundleError, match="not a bundle"):
        _write_and_fail(output, force=True)

    assert (output / "holiday" if kind == "folder" else output).read_bytes() == b"dear"


def test_a_failure_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        _write_and_fail(tmp_path / "bundle", force=False)

    assert _names(tmp_path) == []


def test_a_failure_keeps_the_existing_bundle(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        _write_and_fail(folder, force=True)

    assert open_bundle(folder)
    assert _names(folder.parent) == ["bundle"]


def test_an_output_that_appears_during_the_export_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "bundle"

    with pytest.raises(BundleError, match="appeared during the export"), staged_folder(output):
        output.mkdir()

    assert _names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("name", ["bundle", "model [q4]"])
def test_leftovers_of_a_dead_process_are_removed(tmp_path: Path, name: str) -> None:
    """Brackets in the name were parsed as a glob pattern."""
    dead = _dead_process()
    (tmp_path / f".{name}.partial-{dead}").mkdir()
    (tmp_path / f".{name}.old-{dead}").mkdir()

    with staged_folder(tmp_path / name) as stage:
        write_bundle(stage)

    assert _names(tmp_path) == [name]


def test_leftovers_with_this_process_id_are_removed(tmp_path: Path) -> None:
    """In a container every export has the same process id, so a leftover blocked the next one."""
    (tmp_path / f".bundle.partial-{os.getpid()}").mkdir()

    with staged_folder(tmp_path / "bundle") as stage:
        write_bundle(stage)

    assert _names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("owner", [str(os.getppid()), "mine", "9" * 30])
def test_folders_of_running_processes_or_without_a_process_id_are_kept(
    tmp_path: Path, owner: str
) -> None:
    """A folder whose name doesn't end in a process id was deleted."""
    kept = tmp_path / f".bundle.partial-{owner}"
    kept.mkdir()

    with staged_folder(tmp_path / "bundle") as stage:
        write_bundle(stage)

    assert _names(tmp_path) == [kept.name, "bundle"]


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(BundleError, match="can't create"):
        _write_and_fail(tmp_path / "file" / "bundle", force=False)


def _write_and_fail(output: Path, force: bool) -> None:
    with staged_folder(output, force) as stage:
        write_bundle(stage)
        raise ZeroDivisionError


def _rename_in_manifest(folder: Path, name: str) -> None:
    """Change the artifact's name in the manifest to `name`."""
    fields = json.loads((folder / MANIFEST).read_bytes())
    fields["files"][name] = fields["files"].pop(ARTIFACT)
    for (graph,) in fields["graphs"].values():
        graph["file"] = name
    (folder / MANIFEST).write_text(json.dumps(fields))


def _dead_process() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
