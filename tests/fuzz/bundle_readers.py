"""Readers of bundles and what stands beside them: manifest, artifacts, proofs, baked prefixes."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from gemma_runtime.backends.embedding_table import EmbeddingTable
from gemma_runtime.bundle import open_bundle
from gemma_runtime.contents.codes_gguf import read_gguf_codes
from gemma_runtime.contents.held_codes import codes_digest
from gemma_runtime.contents.inspection import inspect_bundle
from gemma_runtime.contents.pte_file import open_pte
from gemma_runtime.embedding.verify import load_embedding_goldens
from gemma_runtime.embedding_bundle import open_any_bundle
from gemma_runtime.hub import _is_whole
from gemma_runtime.lm_eval.answers import AnswerFile
from gemma_runtime.manifest import SCHEMA_VERSION
from gemma_runtime.mil.interpreter import Program
from gemma_runtime.proof.goldens import load_goldens
from gemma_runtime.proof.safety_prompts import read_prompts
from gemma_runtime.proof.task_runs import open_task_run
from gemma_runtime.proof.teacher import load_teacher
from gemma_runtime.proof.texts import read_segments
from gemma_runtime.report.figures import read_source
from gemma_runtime.text.baked import read_baked
from tests.fuzz.judge import Read
from tests.fuzz.make_corpus import embedding_table
from tests.fuzz.reader import CORPUS, TINY, Reader, as_file

PACKAGE = Path(__file__).with_name("m.mlpackage")
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


def _bundle(folder: Path) -> Read:
    """A bundle whose manifest is the input."""
    for file in TINY.iterdir():
        shutil.copy(file, folder)

    def take(data: bytes) -> None:
        (folder / "manifest.json").write_bytes(data)
        _is_whole(folder)  # what is asked of an answer of the hub
        inspect_bundle(open_bundle(folder))

    return take


def _encoder(folder: Path) -> Read:
    """A bundle that gives vectors, whose manifest is the input."""
    (folder / "model.onnx").write_bytes(b"")

    def take(data: bytes) -> None:
        (folder / "manifest.json").write_bytes(data)
        opened = open_any_bundle(folder)
        opened.path("goldens")

    return take


def _onnx(folder: Path) -> Read:
    """A bundle whose graph is the input, with a digest that fits."""
    shutil.copy(TINY / "model.onnx.data", folder)
    bundle = replace(open_bundle(TINY), directory=folder)

    def take(data: bytes) -> object:
        (folder / "model.onnx").write_bytes(data)
        return codes_digest(bundle)

    return take


# Of the linear layer in the corpus, named by XNNPACK.
_NAMED = "65cf1dc16113b5b4eeeabe9f641fad1993ed6a8802ac266223ad3ae0dd78567e"


def _pte(path: Path) -> None:
    with open_pte(path) as pte:
        for segment in pte.segments():
            _ = pte.data[segment.start : segment.start + min(segment.size, 64)]
        for constant in pte.constants():
            _ = pte.data[constant.start : constant.start + 64]
        pte.named_data(_NAMED)


def _package(changed: str) -> Callable[[Path], Read]:
    """An `.mlpackage` of which one file is the input."""

    def opened(folder: Path) -> Read:
        shutil.copytree(PACKAGE, folder / "m.mlpackage")
        file = folder / "m.mlpackage" / changed

        def take(data: bytes) -> None:
            file.write_bytes(data)
            program = Program(folder / "m.mlpackage")
            for function in program.functions:
                shapes = program.inputs(function).items()
                inputs = {name: np.zeros(one.shape, one.dtype) for name, one in shapes}
                program.run(function, inputs, program.make_state(function))

        return take

    return opened


def _task_run(changed: str) -> Callable[[Path], Read]:
    """A run of lm_eval of which one file is the input."""

    def opened(folder: Path) -> Read:
        (folder / "results_1.json").write_text(json.dumps(_RESULTS))
        (folder / "samples_t_1.jsonl").write_text(json.dumps(SAMPLE))
        return as_file(changed, lambda path: open_task_run(path.parent))(folder)

    return opened


def _answers(path: Path) -> None:
    AnswerFile(path, "").close()


def _baked(path: Path) -> None:
    """With its caches, which are read when they are asked for."""
    dict(read_baked(path).snapshot.caches)


def _table(path: Path) -> None:
    EmbeddingTable(path, 32).rows([0, 3])


_RESULTS = {"config": {}, "configs": {"t": {}}, "group_subtasks": {"g": ["t"], "t": []}}
SAMPLE = {
    **{"doc": {"subject": "s"}, "target": "0", "arguments": {}, "metrics": ["acc"], "acc": 1.0},
    **{"resps": [[["-1.5", "False"]], [["-2", "True"]]], "filtered_resps": [], "filter": "none"},
    **{"doc_hash": "a", "prompt_hash": "b", "target_hash": "c"},
}
REPORTS = TINY.parent / "report"

_TENSOR = {"dtype": "int64", "shape": [1, "tokens"], "kind": None, "layer": None}
_GRAPH = {
    "file": "model.onnx",
    "inputs": [{**_TENSOR, "name": "tokens", "role": "tokens"}],
    "outputs": [{**_TENSOR, "name": "vector", "role": "vector", "dtype": "float32"}],
    "states": [],
}
_ENCODER = {
    "schema_version": SCHEMA_VERSION,
    "kind": "encoder",
    "model": {"id": "m", "family": "f", "parameters": 1, "revision": None, "digest": "d"},
    "target": {
        "name": "onnx", "label": "l", "packages": ["onnxruntime"], "min_runtime_version": "1.24.4"
    },
    "quantization": {
        "recipe": "none", "bits_per_weight": 32, "codes_digest": "", "tensors": {"a": "float32"},
        "calibration": None,
    },
    "vocab_size": 8,
    "context_length": 16,
    "dimensions": 4,
    "before": [2],
    "after": [1],
    "prompts": {"query": "q: "},
    "default_prompt": "query",
    "graphs": {"encode": _GRAPH},
    "quality": {"texts": 1, "mean_cosine": 1, "min_cosine": 1},
    "files": {"model.onnx": {"sha256": sha256(b"").hexdigest(), "bytes": 0}},
    "roles": {"goldens": "model.onnx"},
    "tools": {},
}  # fmt: skip
_VECTORS = [{"name": "a", "tokens": [2, 1], "reference": [0.6, 0.8], "quantized": [1, 0]}]
BUNDLE_READERS: Mapping[str, Reader] = {
    "manifest": Reader(_bundle, [TINY / "manifest.json"]),
    "goldens": Reader(as_file("goldens.json", load_goldens)),
    "encoder manifest": Reader(_encoder, [json.dumps(_ENCODER)]),
    "vectors": Reader(as_file("goldens.json", load_embedding_goldens), [json.dumps(_VECTORS)]),
    "teacher": Reader(as_file("teacher.npz", load_teacher)),
    "onnx codes": Reader(_onnx, [TINY / "model.onnx"]),
    "gguf codes": Reader(
        as_file("m.gguf", lambda path: list(read_gguf_codes(path))), [CORPUS / "gguf" / "Q4_0"]
    ),
    "pte": Reader(as_file("m.pte", _pte), packages=("flatbuffers",)),
    "mil model": Reader(_package(MODEL), [PACKAGE / MODEL]),
    "mil weights": Reader(_package(WEIGHTS), [PACKAGE / WEIGHTS]),
    "mil package": Reader(_package("Manifest.json"), [PACKAGE / "Manifest.json"]),
    "embedding table": Reader(as_file("embedding.safetensors", _table), [embedding_table()]),
    "baked prefix": Reader(as_file("p.baked", _baked)),
    "figures": Reader(as_file("f.json", read_source), sorted(REPORTS.glob("*.json"))),
    "task results": Reader(_task_run("results_1.json"), [json.dumps(_RESULTS)]),
    "task answers": Reader(_task_run("samples_t_1.jsonl"), [json.dumps(SAMPLE) + "\n"]),
    "kept answers": Reader(as_file("a.jsonl", _answers), ['["k", "text"]\n["l", [-1.5, true]]\n']),
    "safety prompts": Reader(
        as_file("p.jsonl", read_prompts), ['{"prompt": "a", "id": 1, "harmless": true}\n']
    ),
    "texts": Reader(as_file("t.txt", read_segments), ["a text\n\nanother, é\n"]),
}
