"""A new family needs only an entry in FAMILIES: all other code reads that table."""

import subprocess
import sys

# Runs in a fresh process, so that the entry exists before other modules read the table.
_NEW_FAMILY = """
from dataclasses import replace

from gemma_export.model.families import FAMILIES

old = FAMILIES["gemma3"]
sizes = {"5b": {**old.sizes["1b"], "model_type": "gemma9_text"}}
FAMILIES["gemma9"] = replace(
    old,
    name="gemma9",
    title="Gemma 9",
    model_type="gemma9_text",
    global_every=5,
    hub_id="example/gemma-9-{size}",
    sizes=sizes,
)
"""

_CONFIG = """
from gemma_export.model.hf_config import config_from_hf
from gemma_export.model.sizes import find_official

official = find_official("5b")
assert (official.family, official.hub_id) == ("gemma9", "example/gemma-9-5b")
config = config_from_hf(sizes["5b"])
assert config.family == "gemma9" and config.qk_norm
assert [kind.value for kind in config.kinds[:6]] == ["local"] * 4 + ["global", "local"]
"""

_GGUF = """
from gemma_export.checkpoint.gguf_config import config_from_gguf
from gemma_export.formats.gguf_file import GgufHeader, GgufTensor
from gemma_export.targets.gguf.metadata import model_metadata
from gguf.constants import GGMLQuantizationType

metadata = model_metadata("name", config)
assert metadata["general.architecture"] == "gemma9"
assert "gemma9.attention.sliding_window_pattern" not in metadata
table = GgufTensor(GGMLQuantizationType.F32, (config.vocab_size, config.hidden_size))
tensors = {f"t{i}": table for i in range(len(config.kinds))}
ends = {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 106}
header = GgufHeader(metadata | ends, {**tensors, "token_embd.weight": table})
assert config_from_gguf(header) == config
"""

_COMMAND = """
from gemma_export.cli import run

assert run(["--size", "5b", "--family", "gemma9", "--plan"]) == 0
assert run(["--help"]) == 0
"""


def test_config_and_sizes_of_a_new_family_are_found() -> None:
    _run(_NEW_FAMILY + _CONFIG)


def test_gguf_metadata_of_a_new_family_are_written_and_read() -> None:
    _run(_NEW_FAMILY + _CONFIG + _GGUF)


def test_the_command_line_offers_a_new_family() -> None:
    output = _run(_NEW_FAMILY + _COMMAND)
    assert "gemma9 to onnx" in output
    assert "(Gemma 9)" in output
    assert "vaultgemma, gemma9" in output


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.replace("│", " ").split())
