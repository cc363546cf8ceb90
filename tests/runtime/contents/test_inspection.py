from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from gemma_runtime.bundle import Bundle
from gemma_runtime.contents.inspection import (
    Comparison,
    compare_bundles,
    inspect_bundle,
    render_comparison,
)
from gemma_runtime.manifest import (
    AttentionKind,
    CalibratedOn,
    Graph,
    Int8Caches,
    LayerCache,
    SamplingDefaults,
    TensorRole,
    TensorSpec,
)
from gemma_runtime.proof.worst_golden import WorstGolden
from tests.runtime.manifests import ARTIFACT, goldens_of, make_manifest, write_bundle


def test_sizes_add_up_to_the_files(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")

    inspection = inspect_bundle(bundle)

    on_disk = {
        name: (bundle.directory / name).stat().st_size for name in (ARTIFACT, "goldens.json")
    }
    assert {name: file.bytes for name, file in inspection.manifest.files.items()} == on_disk
    assert inspection.bytes == sum(on_disk.values())


def test_a_bundle_without_a_tokenizer_says_so(tmp_path: Path, tokenizer_path: Path) -> None:
    without = compare_bundles([write_bundle(tmp_path / "without")])
    having = compare_bundles([write_bundle(tmp_path / "having", tokenizer=tokenizer_path)])

    assert "no tokenizer: token ids only" in _rendered(without)
    assert "tokenizer, without a chat template of its own" in _rendered(having)


def test_int8_caches_show_their_scales_and_what_they_cost() -> None:
    manifest = make_manifest()
    text = CalibratedOn("default", 4096, 0, "1" * 64)
    caches = Int8Caches("ab" * 32, text, replace(manifest.quality, top1=0.975, mean_kl=0.0017))
    manifest = replace(manifest, cache_dtype="int8", int8_caches=caches)

    shown = " ".join(_rendered(compare_bundles([Bundle(Path("bundle"), manifest)])).split())

    assert "1 heads of 8, int8: 768 B" in shown
    assert "abababababababab, measured on 4096 tokens of text default; top-1 97.5%, mean" in shown


def test_caches_are_grouped_by_kind_and_size_and_add_up() -> None:
    layers = [
        LayerCache(AttentionKind.LOCAL, 16, 24, 1, 8),
        LayerCache(AttentionKind.GLOBAL, None, 128, 1, 8),
        LayerCache(AttentionKind.LOCAL, 16, 24, 1, 8),
        LayerCache(AttentionKind.LOCAL, 32, 40, 3, 8),
    ]
    manifest = make_manifest(layers=layers)

    caches = inspect_bundle(Bundle(Path("bundle"), manifest)).caches

    assert [(cache.kind, cache.layers, cache.slots, cache.bytes) for cache in caches] == [
        (AttentionKind.LOCAL, 2, 24, 2 * 2 * 24 * 8 * 4),
        (AttentionKind.GLOBAL, 1, 128, 2 * 128 * 8 * 4),
        (AttentionKind.LOCAL, 1, 40, 2 * 40 * 3 * 8 * 4),
    ]
    for kind in AttentionKind:
        assert sum(c.bytes for c in caches if c.kind is kind) == manifest.cache_bytes(kind)


def test_caches_of_one_kind_and_two_sizes_are_both_shown() -> None:
    """The second size replaced the first one's line."""
    layers = [LayerCache(AttentionKind.LOCAL, 16, slots, 1, 8) for slots in (24, 40)]

    text = _rendered(compare_bundles([Bundle(Path("b"), make_manifest(layers=layers))]))

    assert "1 layers, 24 slots" in text
    assert "1 layers, 40 slots" in text


@pytest.mark.parametrize(("codes", "same"), [("0" * 64, True), ("f" * 64, False)])
def test_bundles_are_compared_by_their_codes(tmp_path: Path, codes: str, same: bool) -> None:
    first = write_bundle(tmp_path / "first")
    second = write_bundle(tmp_path / "second", codes_digest=codes)

    comparison = compare_bundles([first, second])

    assert (comparison.same_model, comparison.same_codes) == (True, same)
    assert ("the same codes" in _rendered(comparison)) is same


def test_the_worst_golden_is_named_beside_the_mean(tmp_path: Path) -> None:
    goldens = goldens_of({"prose": 0.01, "languages": 0.0712})
    comparison = compare_bundles([write_bundle(tmp_path / "bundle", goldens=goldens)])

    (inspection,) = comparison.bundles
    assert inspection.worst_golden == WorstGolden("languages", 32, 0.0712)
    shown = " ".join(_rendered(comparison).split())
    assert "worst golden: languages, KL 0.0712; by language: gemma-runtime eval" in shown
    assert msgspec.json.decode(msgspec.json.encode(comparison), type=Comparison) == comparison


def test_every_section_is_shown(tmp_path: Path) -> None:
    text = _rendered(compare_bundles([write_bundle(tmp_path / "bundle")]))

    for words in ("random:7", "ONNX Runtime 1.29.0", "4.50 bits", "max |x| 12.5", "top-1 75.0%"):
        assert words in text
    for words in ("cache, local", "cache, global", "graph prefill", ARTIFACT, "gemma-export 0.1.0"):
        assert words in text
    assert "the same" not in text  # a single bundle has nothing to compare with


@pytest.mark.parametrize(
    ("sampling", "shown"),
    [
        (None, "none given by the checkpoint"),
        (SamplingDefaults(0.0, 0, 1.0, 0.0, 1.0), "greedy"),
        (
            SamplingDefaults(0.7, 0, 0.9, 0.0, 1.1),
            "temperature 0.7, top-k all, top-p 0.9, min-p 0, repetition penalty 1.1",
        ),
    ],
)
def test_sampling_values_are_named(
    tmp_path: Path, sampling: SamplingDefaults | None, shown: str
) -> None:
    bundle = Bundle(tmp_path, replace(make_manifest(), sampling=sampling))
    assert shown in _rendered(compare_bundles([bundle]))


def test_a_shape_that_looks_like_markup_is_shown() -> None:
    """The shape of `wanted int64[wanted]` was missing."""
    manifest = make_manifest()
    inputs = (TensorSpec("wanted", "int64", ("wanted",), TensorRole.WANTED, None, None),)
    graphs: dict[str, tuple[Graph, ...]] = {
        "decode": (replace(manifest.graph("decode"), inputs=inputs),)
    }

    text = _rendered(compare_bundles([Bundle(Path("b"), replace(manifest, graphs=graphs))]))

    assert "wanted int64[wanted]" in text


def test_every_part_of_a_graph_is_shown_and_caches_that_come_back_once() -> None:
    manifest = make_manifest()
    graph = manifest.graph("decode")
    graphs: dict[str, tuple[Graph, ...]] = {"decode": (graph, replace(graph, file="model-2.onnx"))}

    text = _rendered(compare_bundles([Bundle(Path("b"), replace(manifest, graphs=graphs))]))

    assert f"{ARTIFACT}: tokens int64[1, tokens] → logits float32[1, wanted, 64], 1 states" in text
    assert "model-2.onnx: tokens" in text
    assert "present_key_0" not in text


def test_folders_whose_names_look_like_markup_are_shown() -> None:
    """`[/y]` ended in a traceback."""
    names = ("[/y]", "[red]x")

    text = _rendered(compare_bundles([Bundle(Path(name), make_manifest()) for name in names]))

    assert all(name in text for name in names)


def test_a_comparison_survives_json(tmp_path: Path) -> None:
    comparison = compare_bundles([write_bundle(tmp_path / "a"), write_bundle(tmp_path / "b")])

    assert msgspec.json.decode(msgspec.json.encode(comparison), type=Comparison) == comparison


def _rendered(comparison: Comparison) -> str:
    console = Console(width=250, color_system=None)
    with console.capture() as capture:
        console.print(render_comparison(comparison))
    return capture.get()
