"""Signs bundles and checks signatures: a digest does not say who wrote a bundle.

The signature has minisign's format, and is of `manifest.json`, which has the digest of every file
that is read. So `minisign -Vm manifest.json -p KEY` checks it too. Format: https://jedisct1.github.io/minisign
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_runtime.bundle import MANIFEST, SIGNATURE
from gemma_runtime.embedding_bundle import open_any_bundle
from gemma_runtime.errors import MissingExtra, SignatureError
from gemma_runtime.staging import staged_file

if TYPE_CHECKING:
    from minisign import PublicKey, SecretKey, Signature

_LARGEST = 1 << 16  # bytes of a key or a signature; minisign's have at most 9,000


def sign_bundle(directory: Path, key: Path, ask: Callable[[], str]) -> Path:
    """Sign a bundle with a secret key of minisign; returns the signature's path.

    `ask` gives the password of an encrypted key. Replaces an older signature.
    Raises BundleError for an altered bundle, SignatureError for a key that can't be used.
    """
    minisign = _minisign()
    open_any_bundle(directory)
    path = directory / SIGNATURE
    with _read_secret(minisign, key, ask) as secret:
        signature = secret.sign_file(directory / MANIFEST, prehash=True)
    try:
        with staged_file(path) as partial:
            partial.write_bytes(bytes(signature) + b"\n")
    except OSError as error:
        raise SignatureError(f"can't write {path}: {error.strerror or error}") from error
    return path


def check_signature(directory: Path, key: str) -> str:
    """Check that a public key's owner signed a bundle's manifest; returns the signed comment.

    `key` is a file, or the key itself in base64. The files are not checked here: `open_bundle`
    does that. Raises SignatureError.
    """
    minisign = _minisign()
    public, signature = _read_public(minisign, key), _read_signature(minisign, directory)
    try:
        public.verify(_read(directory / MANIFEST, None), signature)
    except ValueError as error:
        raise SignatureError(
            f"{directory} is not signed by {key}: {error}; take the bundle from its author again"
        ) from error
    return " ".join(str(signature.trusted_comment).split())


def _minisign() -> Any:
    try:
        import minisign
    except ModuleNotFoundError as error:
        raise MissingExtra("py-minisign", "sign") from error
    return minisign


def _read_secret(minisign: Any, path: Path, ask: Callable[[], str]) -> "SecretKey":
    try:
        secret: SecretKey = minisign.SecretKey.from_bytes(_read(path, _LARGEST))
        if secret.is_encrypted():
            secret.decrypt(ask())
    except ValueError as error:
        raise SignatureError(
            f"{path} can't sign: {error}; expected a secret key written by minisign -G"
        ) from error
    return secret


def _read_public(minisign: Any, key: str) -> "PublicKey":
    path = Path(key)
    try:
        if path.is_file():
            found: PublicKey = minisign.PublicKey.from_bytes(_read(path, _LARGEST))
        else:
            found = minisign.PublicKey.from_base64(key)
    except (ValueError, OSError) as error:  # OSError: a name that is too long
        raise SignatureError(
            f"{key} is not a public key: {error}; expected a file written by minisign -G, or the "
            "key in its second line"
        ) from error
    return found


def _read_signature(minisign: Any, directory: Path) -> "Signature":
    path = directory / SIGNATURE
    if not path.is_file():
        raise SignatureError(
            f"{directory} is not signed: it has no {SIGNATURE}; take the bundle from its author "
            "again, or leave --key out"
        )
    try:
        found: Signature = minisign.Signature.from_bytes(_read(path, _LARGEST))
    except ValueError as error:
        raise SignatureError(
            f"{path} is not a signature: {error}; take the bundle from its author again"
        ) from error
    return found


def _read(path: Path, most: int | None) -> bytes:
    """A file's bytes. Raises ValueError for a file with more than `most`."""
    try:
        with path.open("rb") as file:
            content = file.read() if most is None else file.read(most + 1)
    except OSError as error:
        raise SignatureError(f"{path} can't be read: {error.strerror}") from error
    if most is not None and len(content) > most:
        raise ValueError(f"it has more than {most} bytes")
    return content
