"""optimum-executorch: the recipe xnnpack in float32.

Option `custom`: `yes` exports with its own attention and caches, as its documentation advises.
Without them, a model with windows takes one token at a time.
"""

import json
from pathlib import Path
from typing import Any

import executorch.kernels.quantized  # noqa: F401  registers operators
import torch
from executorch.extension.pybindings import portable_lib
from optimum.exporters.executorch.__main__ import main_export


class _Engine:
    packages = ("optimum-executorch", "optimum", "transformers", "executorch", "torch")
    gives_log_probabilities = False

    def __init__(self, program: Path, chunk: int) -> None:
        self._program, self._chunk = program, chunk
        self._module: Any = None
        self._position = 0

    def score(self, tokens: list[int]) -> list[list[float]]:
        self._module, self._position = portable_lib._load_for_executorch(str(self._program)), 0
        rows: list[list[float]] = []
        for start in range(0, len(tokens), self._chunk):
            rows += self._feed(tokens[start : start + self._chunk])
        return rows

    def start(self, tokens: list[int]) -> list[float]:
        return self.score(tokens)[-1]

    def step(self, token: int) -> list[float]:
        return self._feed([token])[-1]

    def chat(self, messages: list[dict[str, str]]) -> None:
        return None

    def _feed(self, tokens: list[int]) -> list[list[float]]:
        positions = torch.arange(self._position, self._position + len(tokens))
        (logits,) = self._module.run_method("forward", (torch.tensor([tokens]), positions))
        self._position += len(tokens)
        rows: list[list[float]] = logits[0].tolist()
        if len(rows) != len(tokens):
            raise RuntimeError(f"the program gives logits of {len(rows)} tokens, not {len(tokens)}")
        return rows


def open_engine(folder: str, scratch: str, options: dict[str, str]) -> _Engine:
    custom = options["custom"] == "yes"
    main_export(
        folder,
        task="text-generation",
        recipe="xnnpack",
        output_dir=scratch,
        max_seq_len=128,
        use_custom_sdpa=custom,
        use_custom_kv_cache=custom,
    )
    window = json.loads((Path(folder) / "config.json").read_text("utf-8"))["sliding_window"]
    return _Engine(Path(scratch) / "model.pte", window - 1 if custom else 1)
