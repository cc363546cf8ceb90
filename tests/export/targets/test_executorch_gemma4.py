"""ExecuTorch programs of tiny Gemma 4s: shared caches, per-layer embeddings, two head sizes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_export.choose import fitted
from gemma_export.formats.format import FLOAT, INT4, Format
from gemma_export.model.config import PER_LAYER_MATRICES, PER_LAYER_TABLE, TABLE
from gemma_export.progress import unheard
from gemma_export.quantize.recipe import Recipe, Rule, find_recipe
from gemma_export.quantize.store import QuantizedStore, open_or_build_store
from gemma_export.targets import ExportJob, Geometry, load_target
from gemma_export.targets.executorch.target import MODEL
from gemma_runtime.backends.executorch_native import NativeEngine
from gemma_runtime.backends.step_session import StepSession
from gemma_runtime.bundle import Bundle
from gemma_runtime.contents.held_codes import codes_digest
from gemma_runtime.contents.pte_file import open_pte
from gemma_runtime.manifest import AttentionKind
from gemma_runtime.proof.agreement import compare_logits
from gemma_runtime.proof.goldens import top_logits
from gemma_runtime.proof.verify import Verdict, verify_bundle
from gemma_runtime.quiet import quiet
from gemma_runtime.session import open_session
from tests.export.conftest import (
    Export,
    TinyCheckpoint,
    check_chunks,
    check_exact,
    dequantized,
    only,
)
from tests.export.models import E2B, E4B, GEMMA4S, WINDOW, eager_logits
from tests.export.rewinding import OPERATIONS, Operation, check_operations, check_resumes, cut
from tests.export.targets.test_executorch import LENGTHS, TOKENS

pytest.importorskip("executorch")

every, edge, e2b = only(*GEMMA4S), only(E2B, E4B), only(E2B)
CHANNEL = Format(8, per_channel=True)
_GATES = Rule(PER_LAYER_MATRICES, CHANNEL, "nearest")
# The two tables in different formats, each in every one.
TABLES = {
    "8 bits, and int4 per layer": Recipe("one", (_GATES, Rule(TABLE, CHANNEL), Rule("*", INT4))),
    "floats, and 8 bits per layer": Recipe(
        "two", (_GATES, Rule(TABLE, FLOAT), Rule(PER_LAYER_TABLE, CHANNEL), Rule("*", INT4))
    ),
    "int4, and floats per layer": Recipe(
        "three", (_GATES, Rule(PER_LAYER_TABLE, FLOAT), Rule("*", INT4))
    ),
}


@pytest.fixture(scope="module")
def float_bundle(tiny: TinyCheckpoint, export: Export) -> Bundle:
    return export(tiny.folder, "none", target="executorch")


@every
@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_decode_and_score_give_the_logits_of_transformers(
    tiny: TinyCheckpoint, float_bundle: Bundle, length: int
) -> None:
    check_exact(float_bundle, tiny, TOKENS[:length])


@every
@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12), restart=st.integers(0, 12))
def test_any_chunks_and_resets_give_the_same_logits(
    tiny: TinyCheckpoint, float_bundle: Bundle, lengths: list[int], restart: int
) -> None:
    check_chunks(float_bundle, tiny, TOKENS, lengths, restart)


@edge
@settings(max_examples=12, deadline=None)
@given(operations=OPERATIONS)
def test_a_rewound_session_is_as_good_as_a_fresh_one(
    float_bundle: Bundle, operations: list[Operation]
) -> None:
    with open_session(float_bundle, 1) as session, open_session(float_bundle, 1) as fresh:
        check_operations(session, fresh, operations)


@edge
@pytest.mark.parametrize("length", [1, WINDOW, 2 * WINDOW + 3, 90])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_a_session_goes_on_from_a_snapshot(float_bundle: Bundle, length: int, chunk: int) -> None:
    with open_session(float_bundle, 1) as session, open_session(float_bundle, 1) as other:
        check_resumes(session, other, cut(TOKENS[:length], chunk))


@edge
def test_only_layers_with_a_cache_of_their_own_have_one(float_bundle: Bundle) -> None:
    manifest = float_bundle.manifest
    owners = [i for i, layer in enumerate(manifest.layers) if layer.source is None]
    states = manifest.graph("decode").states
    assert [spec.name for spec in states] == [f"{p}_{i}" for i in owners for p in ("key", "value")]
    for spec in states:
        assert spec.shape[-1] == (32 if spec.kind is AttentionKind.GLOBAL else 16)


def _store(tiny: TinyCheckpoint, recipe: Recipe) -> QuantizedStore:
    return open_or_build_store(tiny.open(), _fitted(tiny, recipe))


def _fitted(tiny: TinyCheckpoint, recipe: Recipe) -> Recipe:
    return fitted(recipe, tiny.open().config, [load_target("executorch")])


def _check_quantized(tiny: TinyCheckpoint, bundle: Bundle, recipe: Recipe) -> None:
    """Not the same logits: activations are rounded to int8, with one scale per token."""
    expected = eager_logits(dequantized(tiny, recipe), TOKENS[:96]).numpy()
    with open_session(bundle, threads=1) as session:
        figures = compare_logits(session.score(TOKENS[:96]), top_logits(expected, 96), 0.3)
    print(figures)
    assert figures.mean_kl <= 1e-2
    assert figures.top1 + figures.near_ties / figures.positions == 1
    assert codes_digest(bundle) == _store(tiny, recipe).codes_digest


@pytest.mark.parametrize(
    ("tiny", "quant"),
    [(E2B, "int8-channel"), *((tiny, "int4") for tiny in GEMMA4S)],
    indirect=["tiny"],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_codes_give_almost_the_logits_of_their_dequantized_weights(
    tiny: TinyCheckpoint, export: Export, quant: str
) -> None:
    bundle = export(tiny.folder, quant, target="executorch")
    _check_quantized(tiny, bundle, _fitted(tiny, find_recipe(quant)))
    assert verify_bundle(bundle, threads=1).verdict is not Verdict.FAIL


@e2b
@pytest.mark.parametrize("recipe", TABLES.values(), ids=TABLES)
def test_each_table_is_looked_up_in_its_own_format(
    tiny: TinyCheckpoint, export: Export, recipe: Recipe
) -> None:
    _check_quantized(tiny, export(tiny.folder, recipe, target="executorch"), recipe)


@e2b
def test_the_program_contains_each_table_once(tiny: TinyCheckpoint, export: Export) -> None:
    """As constants, whose segment is mapped and not copied."""
    bundle = export(tiny.folder, "int4", target="executorch")
    path, store = bundle.directory / MODEL, _store(tiny, find_recipe("int4"))
    content = path.read_bytes()
    with open_pte(path) as pte:
        segment, starts = pte.constant_segment, {c.start: c.shape for c in pte.constants()}
        for name in (TABLE, PER_LAYER_TABLE):
            codes = store.weight(name).codes(0, 96).codes.numpy()
            assert content.count(codes.tobytes()) == 1
            start = content.index(codes.tobytes())
            assert starts[start] == (96, codes.size // 96)
            assert segment.start < start < segment.start + segment.size - codes.size
    assert len(content) < 1.05 * sum(
        store.weight(name).rows(0, shape[0]).numel() * (4 if len(shape) == 1 else 1)
        for name, shape in store.shapes.items()
    ) + (1 << 20)


class _Traced:
    """The delegates of a program, each with the number of tokens it computes for 8 tokens."""

    def __init__(self, tiny: TinyCheckpoint, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with quiet():
            from gemma_export.targets.executorch import frame, program
            from gemma_export.targets.executorch.named_data import NamedData
            from gemma_export.targets.executorch.ops import Delegate, is_slots
        checkpoint, geometry = tiny.open(), Geometry(64, 8)
        store, caches = (
            _store(tiny, find_recipe("none")),
            load_target("executorch").caches(checkpoint.config, geometry),
        )
        job = ExportJob(checkpoint.config, store, geometry, (1,), 1.0, checkpoint)
        built = program._build(job, caches, NamedData(folder, unheard))
        steps = iter(step for step in built._steps if isinstance(step, Delegate))
        self.tokens: dict[str, int] = {}  # by the names of weights
        self.kinds: list[str] = []  # of all nodes

        def call(lowered: object, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            step = next(steps)
            named = zip(step.inputs, inputs, strict=True)
            (count,) = {x.shape[-2] for name, x in named if not is_slots(name)}
            for constant in step.graph._data[1:]:
                self.tokens.setdefault(constant.named_key, count)
            self.kinds += [type(node.xnode_union).__name__ for node in step.graph._nodes]
            shapes = step.graph.output_shapes
            return tuple(torch.zeros(*shape[:-2], count, shape[-1]) for shape in shapes)

        monkeypatch.setattr(frame, "executorch_call_delegate", call)
        built(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


@pytest.fixture
def traced(tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Traced:
    return _Traced(tiny, tmp_path, monkeypatch)


@every
def test_behind_the_last_cache_only_the_last_token_is_computed(
    tiny: TinyCheckpoint, traced: _Traced
) -> None:
    """E2B computes 20 of its 35 layers for one token of a prompt only."""
    config = tiny.open().config
    for name in config.tensor_shapes():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        before = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        is_narrow = layer > config.last_owner or (layer == config.last_owner and not before)
        if name in traced.tokens and name.endswith("proj.weight"):
            assert traced.tokens[name] == (1 if is_narrow else 8), name
    assert traced.tokens["model.norm.weight"] == 1


@edge
def test_no_gelu_is_xnnpack_s_own_which_is_the_form_with_erf(
    tiny: TinyCheckpoint, traced: _Traced
) -> None:
    """Neither in the MLPs nor in the gates of per-layer embeddings."""
    assert "XNNGelu" not in traced.kinds
    assert traced.kinds.count("XNNSigmoid") == 2 * len(tiny.open().config.kinds)


@e2b
def test_the_native_runner_gives_the_same_logits_without_torch(
    tiny: TinyCheckpoint, export: Export
) -> None:
    bundle = export(tiny.folder, "int4", target="executorch")
    with open_session(bundle, threads=1) as session:
        expected = [session.prefill(TOKENS[:40]), *(session.decode(t) for t in TOKENS[40:60])]
    native = NativeEngine(bundle.directory / MODEL, threads=1)
    with StepSession(native, bundle.manifest) as session:
        logits = [session.prefill(TOKENS[:40]), *(session.decode(t) for t in TOKENS[40:60])]
    assert np.abs(np.stack(logits) - np.stack(expected)).max() <= 1e-5


@e2b
def test_stock_runners_get_the_answers_of_the_manifest(float_bundle: Bundle) -> None:
    manifest = float_bundle.manifest
    expected = {
        "get_max_seq_len": manifest.prefill_length,
        "get_max_context_len": manifest.context_length,
        "get_vocab_size": manifest.vocab_size,
        "get_bos_id": manifest.bos_token,
        "get_n_layers": len(manifest.layers),
        "enable_dynamic_shape": True,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
    }
    assert dict(_answers(float_bundle.directory / MODEL, expected)) == expected


def _answers(path: Path, methods: dict[str, int]) -> Iterator[tuple[str, int]]:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    for name in methods:
        (value,) = program.load_method(name).execute([])
        yield name, value
