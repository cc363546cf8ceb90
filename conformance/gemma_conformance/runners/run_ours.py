"""Bundles of gemma-export, float32 where the target has it, in gemma_runtime. Option `target`."""

from pathlib import Path

from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import QuietReporter
from gemma_export.quantize.recipe import find_recipe
from gemma_runtime.bundle import Bundle
from gemma_runtime.session import open_session
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.tokenizer import load_tokenizer

_LIBRARY = {"onnx": "onnxruntime", "executorch": "executorch", "coreai": "coreai-core"}


class _Engine:
    gives_log_probabilities = False

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._session = open_session(bundle, threads=1)
        library = _LIBRARY.get(bundle.manifest.target.name)
        self.packages = ("gemma-export", *([library] if library else []))

    def score(self, tokens: list[int]) -> list[list[float]]:
        self._session.reset()
        rows: list[list[float]] = self._session.score(tokens).tolist()
        return rows

    def start(self, tokens: list[int]) -> list[float]:
        self._session.reset()
        row: list[float] = self._session.prefill(tokens).tolist()
        return row

    def step(self, token: int) -> list[float]:
        row: list[float] = self._session.decode(token).tolist()
        return row

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        manifest = self._bundle.manifest
        turns = [Message(role=m["role"], content=m["content"]) for m in messages]  # type: ignore[arg-type]
        tokenizer = load_tokenizer(self._bundle)
        return encode_chat(tokenizer, manifest.chat_template, turns, manifest.bos_token)


def open_engine(folder: str, scratch: str, options: dict[str, str]) -> _Engine:
    request = ExportRequest(
        targets=(options["target"],),
        recipe=find_recipe("none"),
        checkpoint=folder,
        context_length=128,
        prefill_length=16,
        output=Path(scratch) / "bundle",
    )
    (result,) = export_bundles(request, QuietReporter())
    return _Engine(result.bundle)
