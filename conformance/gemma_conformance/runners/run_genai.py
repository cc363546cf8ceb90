"""onnxruntime-genai: its model builder in float32 for CPUs, and its generator."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai

_BUILD = Path(__file__).with_name("build_genai.py")


class _Engine:
    packages = ("onnxruntime-genai", "onnxruntime", "transformers", "torch")
    gives_log_probabilities = False

    def __init__(self, folder: Path) -> None:
        self._model = genai.Model(str(folder))
        self._tokenizer = genai.Tokenizer(self._model)
        self._generator = None

    def score(self, tokens: list[int]) -> list[list[float]]:
        generator = self._new(tokens)
        rows = np.array(generator.get_output("logits"), np.float32)[0]
        if len(rows) != len(tokens):
            raise RuntimeError(f"the graph gives logits of {len(rows)} tokens, not {len(tokens)}")
        result: list[list[float]] = rows.tolist()
        return result

    def start(self, tokens: list[int]) -> list[float]:
        self._generator = self._new(tokens)
        return self._last()

    def step(self, token: int) -> list[float]:
        assert self._generator is not None
        self._generator.append_tokens(np.array([token], np.int32))
        return self._last()

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            messages=json.dumps(messages), add_generation_prompt=True
        )
        return [int(token) for token in self._tokenizer.encode(text)]

    def _new(self, tokens: list[int]) -> "genai.Generator":
        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(do_sample=False, max_length=200)
        generator = genai.Generator(self._model, parameters)
        generator.append_tokens(np.array(tokens, np.int32))
        return generator

    def _last(self) -> list[float]:
        assert self._generator is not None
        logits = np.array(self._generator.get_logits(), np.float32)
        row: list[float] = logits.reshape(-1, logits.shape[-1])[-1].tolist()
        return row


def open_engine(folder: str, scratch: str, options: dict[str, str]) -> _Engine:
    output = Path(scratch) / "model"
    command = [sys.executable, str(_BUILD), "-m", folder]
    command += ["-o", str(output), "-p", "fp32", "-e", "cpu", "-c", str(Path(scratch) / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError("the model builder: " + done.stderr.strip().splitlines()[-1])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (output / name).exists():
            shutil.copy(Path(folder) / name, output)
    return _Engine(output)
