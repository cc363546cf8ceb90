"""The commands about a bundle itself: `verify`, `inspect`, `pack` and `sign`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_runtime.command import print_json, print_shown
from gemma_runtime.options import BundlePath, BundlePaths, Json, Threads

if TYPE_CHECKING:  # imported when needed, so --help starts fast
    from rich.table import Table

    from gemma_runtime.bundle import Bundle
    from gemma_runtime.contents.inspection import Comparison
    from gemma_runtime.embedding.inspection import EmbeddingComparison
    from gemma_runtime.embedding.verify import EmbeddingVerification
    from gemma_runtime.embedding_bundle import EmbeddingBundle
    from gemma_runtime.proof.verify import Verification


def verify(
    bundle: BundlePath,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="PUBLIC_KEY",
            help="Refuse the bundle unless the owner of this minisign key signed it: a file, or "
            "the key itself.",
        ),
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Replay the goldens on this machine and print PASS, FAIL or AMBIGUOUS with all figures.

    The exit code is 0 only for PASS. AMBIGUOUS: all limits hold, but too many positions are near
    ties.
    """
    from gemma_runtime.contents.subject import with_subject
    from gemma_runtime.embedding_bundle import open_any_bundle
    from gemma_runtime.proof.verify import Verdict
    from gemma_runtime.signature import check_signature

    comment = None if key is None else check_signature(bundle, key)
    opened = open_any_bundle(bundle)
    if comment is not None:
        print(f"signed by {key}: {comment!a}", file=sys.stderr)
    verification, shown = _verified(opened, str(bundle), threads)
    if json:
        print_json(with_subject(opened, verification))
    else:
        print_shown(shown)
    if verification.verdict is not Verdict.PASS:
        raise typer.Exit(1)


def inspect(bundles: BundlePaths, json: Json = False) -> None:
    """Describe bundles; for several, also check whether they hold the same codes."""
    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.contents.inspection import compare_bundles, render_comparison
    from gemma_runtime.embedding.inspection import (
        compare_embedding_bundles,
        render_embedding_comparison,
    )
    from gemma_runtime.embedding_bundle import gives_vectors, open_embedding_bundle

    comparison: Comparison | EmbeddingComparison
    if not gives_vectors(bundles[0]):
        comparison = compare_bundles([open_bundle(bundle) for bundle in bundles])
        shown = render_comparison(comparison)
    else:
        comparison = compare_embedding_bundles([open_embedding_bundle(one) for one in bundles])
        shown = render_embedding_comparison(comparison)
    if json:
        print_json(comparison)
    else:
        print_shown(shown)


def pack(bundle: BundlePath, json: Json = False) -> None:
    """Save an ONNX bundle's weights as this machine's kernels read them; sessions then map them.

    They lie in the cache folder: gemma-export cache lists and removes them.
    """
    from gemma_runtime.backends.packed import pack_weights
    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.machine import format_bytes

    packed = pack_weights(open_bundle(bundle))
    if json:
        print_json(packed)
        return
    print(
        f"{packed.path}\n{format_bytes(packed.bytes)}, the bundle has "
        f"{format_bytes(packed.stored_bytes)}; sessions of it now map this file"
    )


def sign(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    key: Annotated[
        Path,
        typer.Option(
            metavar="SECRET_KEY", help="A secret key written by minisign -G; none is made here."
        ),
    ],
) -> None:
    """Sign a bundle with a key of minisign, so that others can tell who wrote it: verify --key.

    Writes manifest.json.minisig, which minisign itself checks too. The password of an encrypted key
    is asked for, or read from stdin if that is not a terminal.
    """
    from gemma_runtime.signature import sign_bundle

    print(sign_bundle(bundle, key, _ask_password))


def _ask_password() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    from getpass import getpass

    return getpass("Password of the key: ")


def _verified(
    opened: "Bundle | EmbeddingBundle", name: str, threads: int | None
) -> "tuple[Verification | EmbeddingVerification, Table]":
    from gemma_runtime.bundle import Bundle

    if isinstance(opened, Bundle):
        from gemma_runtime.proof.verify import render_verification, verify_bundle

        verification = verify_bundle(opened, threads)
        return verification, render_verification(name, verification)
    from gemma_runtime.embedding.verify import render_embedding_verification, verify_embeddings

    of_vectors = verify_embeddings(opened, threads)
    return of_vectors, render_embedding_verification(name, of_vectors)
