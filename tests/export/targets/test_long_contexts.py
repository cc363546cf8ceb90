"""The last positions of the longest contexts: 8,192 tokens of a Gemma 2, 32,768 of a Gemma 3.

transformers multiplies positions and frequencies in float32, so at 32,768 its angles are off by up
to a thousandth, and its logits by 6e-4. Here it gets the angles in float64, as our graphs do.
"""

import copy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from gemma_export.checkpoint.gguf_tokenizer import rebuild_tokenizer
from gemma_runtime.backends.chunk_inputs import ChunkInputs
from gemma_runtime.backends.rope import rope_angles
from gemma_runtime.bundle import Bundle, open_bundle
from gemma_runtime.errors import ContextFull
from gemma_runtime.manifest import AttentionKind, Rope, TensorRole
from gemma_runtime.proof.goldens import log_softmax
from gemma_runtime.session import Logits, open_session
from gemma_runtime.snapshot import Snapshot
from tests.export.checkpoint.test_gguf_tokenizer import HERE, metadata
from tests.export.conftest import export_folder
from tests.export.llama_server import LlamaServer
from tests.export.models import GEMMA2, GEMMA3, WINDOW, Tiny

END = 8  # positions whose logits are compared
_CHUNK = 1024
_L, _G = "sliding_attention", "full_attention"


def longest(tiny: Tiny, context: int) -> Tiny:
    """A local and a global layer with one head of 16, for the whole context."""
    config = copy.deepcopy(tiny.config)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16}
    one = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 2}
    limits = {"max_position_embeddings": context, "query_pre_attn_scalar": 16}
    for name, value in (sizes | one | limits | {"layer_types": [_L, _G]}).items():
        setattr(config, name, value)
    return replace(tiny, config=config)


@dataclass(frozen=True)
class Long:
    folder: Path
    tokens: list[int]  # as many as the context holds
    logits: Logits  # (END, V), after each of the last tokens
    before: dict[AttentionKind, tuple[NDArray[np.float32], NDArray[np.float32]]]
    """Keys and values, (1, T, 16), of each kind of layer before the last tokens."""


@pytest.fixture(scope="module", params=[(GEMMA2, 8192), (GEMMA3, 32768)], ids=["gemma2", "gemma3"])
def long(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Long:
    kind, context = request.param
    tiny = longest(kind, context)
    model, folder = tiny.build(), tmp_path_factory.mktemp(tiny.name) / "m"
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(rebuild_tokenizer(HERE, metadata()))
    tokens = np.random.default_rng(1).integers(0, 64, context).tolist()
    use_exact_angles(model)
    cache = DynamicCache(config=model.config)
    for start in range(0, context - END, _CHUNK):
        feed(model, cache, tokens[start : min(start + _CHUNK, context - END)])
    caches: Any = cache.layers  # of other models, some have no keys
    layers = zip((AttentionKind.LOCAL, AttentionKind.GLOBAL), caches, strict=True)
    before = {k: (c.keys[0].numpy().copy(), c.values[0].numpy().copy()) for k, c in layers}
    return Long(folder, tokens, feed(model, cache, tokens[-END:]), before)


@torch.inference_mode()
def feed(model: PreTrainedModel, cache: DynamicCache, tokens: list[int]) -> Logits:
    ids = torch.tensor([tokens])
    done = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=END)
    logits: Logits = done.logits[0].numpy()
    return logits


def use_exact_angles(model: PreTrainedModel) -> None:
    """Give each attention cosines and sines of angles in float64."""
    (rotary,) = (m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
    config: Any = model.config

    def forward(
        x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rope = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        turns = rope["rope_theta"] ** -steps / rope.get("factor", 1.0)
        angles = position_ids[..., None].double() * turns
        both = torch.cat((angles, angles), -1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)

    rotary.forward = forward


def export(long: Long, target: str, prefill: int) -> Bundle:
    output = long.folder.with_name(target)
    if output.exists():
        return open_bundle(output)
    context = len(long.tokens)
    return export_folder(
        long.folder, "none", output, context=context, prefill=prefill, target=target
    )


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_the_last_positions_give_the_logits_of_transformers(long: Long, target: str) -> None:
    if target == "executorch":
        pytest.importorskip("executorch")
        if len(long.tokens) > 8192:
            pytest.skip("32,768 tokens take XNNPACK most of a minute; they were within 1e-5")
    with open_session(export(long, target, _CHUNK), threads=1) as session:
        session.prefill(long.tokens[:-END])
        found = np.stack([session.decode(token) for token in long.tokens[-END:]])
        with pytest.raises(ContextFull, match=f"pass the context of {len(long.tokens)}"):
            session.decode(0)
    print(f"max |Δlogit| {np.abs(found - long.logits).max():.1e}")
    assert np.abs(found - long.logits).max() <= 3e-5


@pytest.mark.parametrize(
    ("target", "package", "near"), [("coreml", "coremltools", 0.03), ("coreai", "coreai", 0.15)]
)
def test_float16_targets_go_on_from_the_caches_of_transformers(
    long: Long, target: str, package: str, near: float
) -> None:
    """They take chunks of 16 tokens at most, so the caches are put in instead of computed.

    Core AI's runtime on Linux adds up 32,768 products in float16, which costs half a logit.
    """
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if target == "coreai" and len(long.tokens) > 8192:
        pytest.skip("NOT COMPARED: the runtime's sums in float16 are too coarse; see coreai.md")
    bundle = export(long, target, WINDOW)
    with open_session(bundle, threads=1) as session:
        session.prefill([0])
        session.resume(snapshot(long, bundle, session.save()))
        found = np.stack([session.decode(token) for token in long.tokens[-END:]])
        with pytest.raises(ContextFull):
            session.decode(0)
    print(f"max |Δlogit| {np.abs(found - long.logits).max():.1e}")
    assert np.abs(found - long.logits).max() <= near


def snapshot(long: Long, bundle: Bundle, like: Snapshot) -> Snapshot:
    """The caches of transformers in rings: position p in slot p mod S, keys before values."""
    count = len(long.tokens) - END
    caches = {}
    for spec in bundle.manifest.graph("decode").states:
        assert spec.kind is not None
        slots = next(c.slots for c in bundle.manifest.layers if c.kind is spec.kind)
        keys, values = long.before[spec.kind]
        held = min(slots, keys.shape[1])
        places = np.arange(count - held, count) % slots
        rows = np.zeros((2, min(slots, count), keys.shape[-1]), np.float16)
        rows[0, places], rows[1, places] = keys[0, -held:], values[0, -held:]
        (name,) = (name for name in like.caches if name.endswith(spec.name))
        caches[name] = rows
    return Snapshot(tuple(long.tokens[:count]), count, like.graph, caches)


def test_llama_cpp_gives_the_probabilities_of_transformers_at_the_end(long: Long) -> None:
    """Its float16 caches cost more the longer they are: unlikely tokens' log p up to 0.3."""
    pytest.importorskip("xllamacpp", reason="NOT CHECKED in llama.cpp: pip install xllamacpp")
    context = len(long.tokens)
    server = LlamaServer(export(long, "gguf", 512).directory / "model.gguf", context)
    found = server.log_probabilities(long.tokens[:-1], 64)
    wanted = log_softmax(long.logits[-2:-1])[0]
    kl = (np.exp(wanted) * (wanted - found)).sum()
    print(f"KL {kl:.1e}, max |Δlog p| {np.abs(found - wanted).max():.1e}")
    assert kl <= 1e-3
    assert np.abs(np.exp(found) - np.exp(wanted)).max() <= 5e-3


def test_the_inputs_of_a_chunk_are_exact_at_the_last_position(long: Long) -> None:
    """Core ML's and Core AI's programs get cosines and sines, rounded to float16."""
    pytest.importorskip("coremltools")
    bundle, last = export(long, "coreml", WINDOW), len(long.tokens) - 1
    graph = bundle.manifest.graph("decode")
    values = ChunkInputs(bundle.manifest, {}, long.tokens[-1:], last).of(graph)
    parts = {TensorRole.COS: "cos", TensorRole.SIN: "sin"}
    given = [spec for spec in graph.inputs if spec.role in parts]
    assert len(given) == 4
    for spec in given:
        assert spec.kind is not None
        exact = exact_parts(bundle.manifest.ropes[spec.kind], last, 16)[parts[spec.role]]
        assert np.abs(values[spec.name][0] - exact).max() <= 2.0**-12 + 1e-10


def test_a_graph_s_tables_are_exact_at_the_last_position(long: Long) -> None:
    bundle = export(long, "onnx", _CHUNK)
    path = bundle.directory / bundle.manifest.graph("decode").file
    tables = [t for t in onnx.load(path).graph.initializer if t.name.startswith("rope_")]
    last, checked = len(long.tokens) - 1, 0
    for rope in set(bundle.manifest.ropes.values()):
        name = f"rope_{rope.base:g}_{rope.factor:g}_{rope.rotated:g}_16"
        found = {t.name: onnx.numpy_helper.to_array(t)[last] for t in tables}
        for part, exact in exact_parts(rope, last, 16).items():
            assert np.abs(found[f"{name}_{part}"] - exact).max() <= 2.0**-25 + 1e-10
            checked += 1
    assert checked == len(tables)


@pytest.mark.parametrize("position", [8191, 32767, 131071])
@pytest.mark.parametrize(
    ("rope", "width"),
    [
        (Rope(1e4, 1.0), 256),
        (Rope(1e6, 1.0), 256),
        (Rope(1e6, 8.0), 128),
        (Rope(1e6, 1.0, 0.25), 512),
    ],
    ids=str,
)
def test_cosines_and_sines_of_real_shapes_are_exact_to_float32(
    rope: Rope, width: int, position: int
) -> None:
    (angles,) = rope_angles(rope, [position], width)
    found = {"cos": np.cos(angles), "sin": np.sin(angles)}
    for part, exact in exact_parts(rope, position, width).items():
        assert np.abs(found[part].astype(np.float32) - exact).max() <= 2.0**-25 + 1e-10


def exact_parts(rope: Rope, position: int, width: int) -> dict[str, NDArray[np.float64]]:
    """Cosines and sines, (width / 2,), computed with 40 digits."""
    turning = int(rope.rotated * width // 2)
    with mpmath.workdps(40):
        angles = [
            mpmath.mpf(position) / rope.factor * mpmath.power(rope.base, -mpmath.mpf(2 * i) / width)
            if i < turning
            else mpmath.mpf(0)
            for i in range(width // 2)
        ]
        parts = {"cos": map(mpmath.cos, angles), "sin": map(mpmath.sin, angles)}
        return {name: np.array([float(x) for x in values]) for name, values in parts.items()}
