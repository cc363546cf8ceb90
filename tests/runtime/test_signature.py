"""Signatures of bundles, with keys made here, and minisign itself where it is installed."""

import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gemma_runtime.bundle import MANIFEST, SIGNATURE, open_bundle
from gemma_runtime.cli import run_command

minisign = pytest.importorskip(
    "minisign", reason="NOT TESTED: signatures; run: pip install py-minisign"
)

TINY = Path(__file__).parents[1] / "data" / "tiny"
FILES = sorted(path.name for path in TINY.iterdir() if path.name != MANIFEST)
Captured = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Keys:
    secret: Path
    public: Path
    text: str  # the public key in base64


def make_keys(folder: Path, password: str | None = None) -> Keys:
    folder.mkdir()
    pair = minisign.KeyPair.generate()
    public = Keys(
        folder / "secret.key", folder / "public.pub", pair.public_key.to_base64().decode()
    )
    public.public.write_bytes(bytes(pair.public_key) + b"\n")
    if password is not None:
        pair.secret_key.encrypt(password, opslimit=1 << 15, memlimit=1 << 24)  # else a second
    public.secret.write_bytes(bytes(pair.secret_key) + b"\n")
    return public


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return make_keys(tmp_path / "keys")


@pytest.fixture
def signed(tmp_path: Path, keys: Keys, capsys: Captured) -> Path:
    folder = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    assert run_command(["sign", str(folder), "--key", str(keys.secret)]) == 0
    assert capsys.readouterr().out == f"{folder / SIGNATURE}\n"
    return folder


def verify(folder: Path, key: object) -> int:
    return run_command(["verify", str(folder), "--key", str(key), "--threads", "1"])


def refused(captured: Captured) -> str:
    """The only line on stderr; nothing is on stdout."""
    output = captured.readouterr()
    (line,) = output.err.splitlines()
    assert output.out == ""
    assert line.startswith("error: ")
    return line


def test_a_signed_bundle_is_verified_with_the_key_s_file_and_its_text(
    signed: Path, keys: Keys, capsys: Captured
) -> None:
    for key in (keys.public, keys.text):
        assert verify(signed, key) == 0
        output = capsys.readouterr()
        assert f"signed by {key}: 'timestamp:" in output.err
        assert "PASS" in output.out
    assert sorted(path.name for path in signed.iterdir()) == sorted([*FILES, MANIFEST, SIGNATURE])


def test_a_bundle_without_a_signature_is_refused_if_a_key_is_given(
    keys: Keys, capsys: Captured
) -> None:
    assert verify(TINY, keys.public) == 1
    assert "is not signed: it has no manifest.json.minisig" in refused(capsys)


def test_a_bundle_that_somebody_else_signed_is_refused(
    signed: Path, tmp_path: Path, capsys: Captured
) -> None:
    """Its digests are right: whoever alters a bundle can write them."""
    other = make_keys(tmp_path / "other")
    assert verify(signed, other.public) == 1
    assert "is not signed by" in refused(capsys)

    assert run_command(["sign", str(signed), "--key", str(other.secret)]) == 0
    capsys.readouterr()
    assert verify(signed, other.public) == 0


@pytest.mark.parametrize("name", FILES)
def test_the_signature_covers_every_file(
    signed: Path, keys: Keys, capsys: Captured, name: str
) -> None:
    content = bytearray((signed / name).read_bytes())
    content[len(content) // 2] ^= 1
    (signed / name).write_bytes(content)

    assert verify(signed, keys.public) == 1

    assert f"{name} was altered" in refused(capsys)


def test_digests_written_anew_do_not_help_who_has_no_key(
    signed: Path, keys: Keys, capsys: Captured
) -> None:
    fields = json.loads((signed / MANIFEST).read_bytes())
    fields["chat_template"] = "{{ 'mine' }}"
    (signed / MANIFEST).write_text(json.dumps(fields))
    assert open_bundle(signed).manifest.chat_template == "{{ 'mine' }}"

    assert verify(signed, keys.public) == 1

    assert "is not signed by" in refused(capsys)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _fill(path: Path) -> None:
    path.write_bytes(b"x" * 200_000)


def _comment(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"timestamp:", b"timestamp:9"))


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "is not a signature: invalid"),
        (_fill, "is not a signature: it has more than"),
        (_comment, "is not signed by"),
        (_pipe, "is not signed: it has no"),
    ],
)
def test_a_damaged_signature_is_one_line(
    signed: Path, keys: Keys, capsys: Captured, damage: Callable[[Path], None], message: str
) -> None:
    damage(signed / SIGNATURE)
    assert verify(signed, keys.public) == 1
    assert message in refused(capsys)


def test_a_key_that_is_none_is_one_line(signed: Path, keys: Keys, capsys: Captured) -> None:
    for key in ("nothing", keys.secret, TINY, "x" * 500, keys.text[:-4]):
        assert verify(signed, key) == 1
        assert "is not a public key: " in refused(capsys)
    for path in (keys.public, signed / SIGNATURE, keys.secret.parent / "nothing", TINY):
        assert run_command(["sign", str(signed), "--key", str(path)]) == 1
        assert "expected a secret key" in (line := refused(capsys)) or "can't be read" in line


def test_an_altered_bundle_is_not_signed(tmp_path: Path, keys: Keys, capsys: Captured) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "altered"))
    (folder / "recipe.yaml").write_bytes((folder / "recipe.yaml").read_bytes()[::-1])

    assert run_command(["sign", str(folder), "--key", str(keys.secret)]) == 1

    assert "recipe.yaml was altered" in refused(capsys)
    assert not (folder / SIGNATURE).exists()


@pytest.mark.parametrize("typed", ["right\n", "wrong\n", ""])
def test_the_password_of_a_key_is_read_from_stdin(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    keys = make_keys(tmp_path / "encrypted", "right")
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))

    code = run_command(["sign", str(folder), "--key", str(keys.secret)])

    assert (folder / SIGNATURE).exists() is (typed == "right\n")
    if typed == "right\n":
        assert code == 0
        assert verify(folder, keys.public) == 0
    else:
        assert code == 1
        assert "wrong password for that key" in refused(capsys)


@pytest.mark.skipif(shutil.which("minisign") is None, reason="NOT TESTED: minisign is missing")
def test_minisign_and_we_check_each_other_s_signatures(
    signed: Path, keys: Keys, tmp_path: Path, capsys: Captured
) -> None:
    def run(*arguments: object) -> None:
        subprocess.run(["minisign", *map(str, arguments)], check=True, capture_output=True)

    run("-V", "-m", signed / MANIFEST, "-p", keys.public)
    run("-G", "-W", "-p", tmp_path / "its.pub", "-s", tmp_path / "its.key")
    run("-S", "-s", tmp_path / "its.key", "-m", signed / MANIFEST)
    assert verify(signed, tmp_path / "its.pub") == 0
    assert run_command(["sign", str(signed), "--key", str(tmp_path / "its.key")]) == 0
    run("-V", "-m", signed / MANIFEST, "-p", tmp_path / "its.pub")
