"""Builds valid, tiny manifests and bundles by hand; their artifact doesn't run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gemma_runtime.bundle import MANIFEST, Bundle, describe_files
from gemma_runtime.manifest import (
    SCHEMA_VERSION,
    Agreement,
    AttentionKind,
    File,
    Graph,
    Headroom,
    LayerCache,
    Manifest,
    Model,
    Quantization,
    Rope,
    SamplingDefaults,
    Target,
    TensorRole,
    TensorSpec,
)
from gemma_runtime.proof.goldens import Golden, TopLogits, save_goldens

ARTIFACT = "model.onnx"
DIGEST = "0" * 64


def make_manifest(
    files: Mapping[str, File] | None = None,
    *,
    roles: Mapping[str, str] | None = None,
    target: str = "onnx",
    vocab_size: int = 64,
    context_length: int = 128,
    layers: Sequence[LayerCache] | None = None,
    codes_digest: str = DIGEST,
) -> Manifest:
    """A manifest with every field filled: two local layers and a global one."""
    graph = make_graph(vocab_size)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        model=Model("random:7", "gemma3", 4096, None, DIGEST),
        target=Target(target, "ONNX Runtime", ("onnxruntime",), "1.29.0"),
        quantization=Quantization(
            "int4", 4.5, codes_digest, {"model.norm.weight": "float32"}, None
        ),
        vocab_size=vocab_size,
        context_length=context_length,
        prefill_length=32,
        bos_token=2,
        eos_token=1,
        stop_tokens=(1,),
        sampling=SamplingDefaults(1.0, 64, 0.95, 0.0, 1.0),
        chat_template=None,
        layers=tuple(make_layers(context_length) if layers is None else layers),
        cache_dtype="float32",
        graphs={"prefill": (graph,), "decode": (graph,)},
        headroom=Headroom(12.5, 1.0),
        quality=Agreement(64, 0.75, 3, 1.5, 0.25, 0.125, 0.5),
        files=dict(files or {ARTIFACT: File(DIGEST, 8)}),
        roles=dict(roles or {}),
        tools={"gemma-export": "0.1.0"},
        ropes={AttentionKind.LOCAL: Rope(1e4, 1.0), AttentionKind.GLOBAL: Rope(1e6, 1.0)},
    )


def make_layers(context_length: int = 128) -> list[LayerCache]:
    local = LayerCache(AttentionKind.LOCAL, 16, 24, 1, 8)
    return [local, local, LayerCache(AttentionKind.GLOBAL, None, context_length, 1, 8)]


def make_graph(vocab_size: int) -> Graph:
    return Graph(
        ARTIFACT,
        (TensorSpec("tokens", "int64", (1, "tokens"), TensorRole.TOKENS, None, None),),
        (
            TensorSpec(
                "logits", "float32", (1, "wanted", vocab_size), TensorRole.LOGITS, None, None
            ),
            make_cache("present_key_0"),
        ),
        (make_cache("past_key_0"),),
    )


def make_cache(name: str, layer: int = 0) -> TensorSpec:
    return TensorSpec(name, "float32", (1, 1, 24, 8), TensorRole.KEYS, AttentionKind.LOCAL, layer)


def goldens_of(kls: Mapping[str, float]) -> list[Golden]:
    """Goldens by name, with the mean KL of quantized weights on each, and logits of one token."""
    top = TopLogits(ids=[[0]], logits=[[0.0]], log_sum_exp=[0.0])
    quality = Agreement(32, 0.9, 1, 1.0, 0.1, 0.0, 0.3)
    return [Golden(name, [2], top, top, replace(quality, mean_kl=kl)) for name, kl in kls.items()]


def write_bundle(
    folder: Path,
    goldens: Sequence[Golden] = (),
    *,
    tokenizer: Path | None = None,
    target: str = "onnx",
    vocab_size: int = 64,
    codes_digest: str = DIGEST,
) -> Bundle:
    """Write a folder that `open_bundle` accepts; its artifact is only a few bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ARTIFACT).write_bytes(b"artifact")
    roles = {"goldens": "goldens.json"}
    save_goldens(folder / "goldens.json", goldens)
    if tokenizer is not None:
        (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
        roles["tokenizer"] = "tokenizer.json"
    manifest = make_manifest(
        describe_files(folder),
        roles=roles,
        target=target,
        vocab_size=vocab_size,
        codes_digest=codes_digest,
    )
    (folder / MANIFEST).write_bytes(manifest.to_json())
    return Bundle(folder, manifest)
