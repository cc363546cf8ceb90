"""Verifies on this machine that a bundle's vectors are those of its checkpoint.

As for bundles that generate text, two errors are told apart. *Lowering* compares with the reference
that has the same codes, and decides. *Quantization* compares with the float32 weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from rich.table import Table
from rich.text import Text

from gemma_runtime.embedding.embedder import Embedder, Vectors, open_embedder
from gemma_runtime.embedding_bundle import EmbeddingBundle, VectorAgreement
from gemma_runtime.errors import BundleError
from gemma_runtime.formats.json_bytes import decode_json
from gemma_runtime.proof.verify import Verdict


@dataclass(frozen=True, slots=True)
class EmbeddingGolden:
    """A text's tokens, with the vectors of two references."""

    name: str
    tokens: list[int]
    reference: list[float]  # from the float32 weights
    quantized: list[float]  # from the quantized weights, computed in float32


@dataclass(frozen=True, slots=True)
class EmbeddingLimits:
    # Of the shipped graph, which may round activations to int8: random weights at official shapes
    # lost up to 0.014 by that.
    min_cosine: float = 0.95
    min_exact_cosine: float = 0.99999  # with float activations


@dataclass(frozen=True, slots=True)
class EmbeddingVerification:
    verdict: Verdict
    failures: tuple[str, ...]  # one line for each limit that was exceeded
    limits: EmbeddingLimits
    lowering: VectorAgreement  # artifact against the reference with the same codes
    exact: VectorAgreement | None  # lowering with float activations, if there is such a graph
    quantization: VectorAgreement  # artifact against the float32 reference
    by_golden: dict[str, float]  # cosine of the lowering, by the golden's name


_LIMITS = EmbeddingLimits()


def verify_embeddings(bundle: EmbeddingBundle, threads: int | None = None) -> EmbeddingVerification:
    """Make the goldens' vectors on the main graph, and on the exact graph if there is one."""
    goldens = load_embedding_goldens(bundle.path("goldens"))
    if not goldens:
        raise BundleError("the bundle has no goldens, so it can't be verified; export again")
    _check_goldens(goldens, bundle.manifest.dimensions)
    exact = None
    if "exact" in bundle.manifest.graphs:
        with open_embedder(bundle, threads, exact=True) as embedder:
            exact = compare_vectors(_replay(embedder, goldens), _of(goldens, "quantized"))
    with open_embedder(bundle, threads) as embedder:
        actual = _replay(embedder, goldens)
    return judge(actual, goldens, exact)


def judge(
    actual: Vectors, goldens: Sequence[EmbeddingGolden], exact: VectorAgreement | None
) -> EmbeddingVerification:
    """The verdict on an artifact's vectors, (N, D), of the goldens."""
    expected = _of(goldens, "quantized")
    lowering = compare_vectors(actual, expected)
    # Without a graph of its own for float activations, the shipped one has them.
    least = _LIMITS.min_cosine if exact else _LIMITS.min_exact_cosine
    failures = (
        *_failures("lowering", lowering, least),
        *(_failures("the float kernels", exact, _LIMITS.min_exact_cosine) if exact else ()),
    )
    cosines = _cosines(actual, expected).tolist()
    return EmbeddingVerification(
        verdict=Verdict.FAIL if failures else Verdict.PASS,
        failures=failures,
        limits=_LIMITS,
        lowering=lowering,
        exact=exact,
        quantization=compare_vectors(actual, _of(goldens, "reference")),
        by_golden={g.name: cosine for g, cosine in zip(goldens, cosines, strict=True)},
    )


def compare_vectors(actual: Vectors, expected: Vectors) -> VectorAgreement:
    """The cosines of two sets of vectors, (N, D) each."""
    cosines = _cosines(actual, expected)
    return VectorAgreement(len(cosines), float(cosines.mean()), float(cosines.min()))


def save_embedding_goldens(path: Path, goldens: Sequence[EmbeddingGolden]) -> None:
    path.write_bytes(msgspec.json.encode(goldens))


def load_embedding_goldens(path: Path) -> list[EmbeddingGolden]:
    """Read a file of `save_embedding_goldens`. Raises BundleError if it is not one."""
    try:
        return decode_json(path.read_bytes(), list[EmbeddingGolden])
    except (OSError, msgspec.DecodeError) as error:
        raise BundleError(f"{path} is not a goldens file: {error}; export again") from error


def render_embedding_verification(name: str, verification: EmbeddingVerification) -> Table:
    """The figures as a table, with the verdict as its title and the reasons below."""
    color = "green" if verification.verdict is Verdict.PASS else "red"
    title = Text.assemble(f"{name}: ", (verification.verdict.value, color))
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "texts", "mean cosine", "least cosine"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    rows = (
        ("lowering", verification.lowering),
        *([("  float kernels", verification.exact)] if verification.exact else []),
        ("quantization", verification.quantization),
    )
    for label, figures in rows:
        cells = (str(figures.texts), f"{figures.mean_cosine:.6f}", f"{figures.min_cosine:.6f}")
        table.add_row(label, *cells)
    table.caption = Text(
        "\n".join(verification.failures)
        or "lowering: vectors against the reference with the same codes, decides the verdict; "
        "quantization: against the float32 weights, depends on the recipe"
    )
    table.caption_justify = "left"
    return table


def _check_goldens(goldens: Sequence[EmbeddingGolden], dimensions: int) -> None:
    for golden in goldens:
        if {len(golden.reference), len(golden.quantized)} != {dimensions}:
            raise BundleError(
                f"golden {golden.name!r:.40} has vectors of other sizes than {dimensions}; export "
                "again"
            )


def _replay(embedder: Embedder, goldens: Sequence[EmbeddingGolden]) -> Vectors:
    return np.stack([embedder.run(golden.tokens) for golden in goldens])


def _of(goldens: Sequence[EmbeddingGolden], which: str) -> Vectors:
    return np.array([getattr(golden, which) for golden in goldens], np.float32)


def _cosines(a: Vectors, b: Vectors) -> Vectors:
    """Of each pair of rows, (N,) float64; NaN where a vector is not finite, or has no length."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        lengths = np.linalg.norm(a64, axis=-1) * np.linalg.norm(b64, axis=-1)
        cosines: Vectors = (a64 * b64).sum(-1) / lengths
    return cosines


def _failures(what: str, figures: VectorAgreement, least: float) -> tuple[str, ...]:
    if figures.min_cosine >= least:  # False for NaN
        return ()
    return (f"the least cosine of {what} is {figures.min_cosine:.6f}, below {least}",)
