"""A table of per-layer embeddings stays in its file while a program runs."""

import copy
import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gemma_export.formats.format import FLOAT, INT4, Format
from gemma_export.model.config import PER_LAYER_MATRICES, PER_LAYER_TABLE
from gemma_export.quantize.recipe import Recipe, Rule
from tests.export.conftest import Export
from tests.export.models import E2B, Tiny, save_tiny

pytest.importorskip("executorch")
pytestmark = [
    pytest.mark.serial,
    pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc"),
]
MIB = 1 << 20
ROWS, COLUMNS = 16384, 2048
_CHANNEL = Format(8, per_channel=True)
RECIPE = Recipe(
    "wide",
    (
        Rule(PER_LAYER_TABLE, _CHANNEL, "nearest"),
        Rule(PER_LAYER_MATRICES, FLOAT),
        Rule("*", INT4, "nearest"),
    ),
)
# Loads a bundle, feeds three tokens, and prints bytes: anonymous memory that was added, locked
# memory, and what is mapped of the program.
SCRIPT = """
import json, sys
from pathlib import Path
import torch, executorch.runtime
from gemma_runtime.bundle import open_bundle
from gemma_runtime.session import open_session

def count(key, name):
    total, mapped = 0, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field, *rest = line.split()
        if not field.endswith(":"):
            mapped = rest[-1] if len(rest) == 5 else ""
        elif field == key + ":" and mapped.endswith(name):
            total += int(rest[0]) * 1024
    return total

before = count("Anonymous", "")
with open_session(open_bundle(Path(sys.argv[1])), threads=1) as session:
    session.prefill([5, 16000])
    session.decode(7)
    added = count("Anonymous", "") - before
    print(json.dumps([added, count("Locked", ""), count("Size", "model.pte")]))
"""


def _wide() -> Tiny:
    """A model whose table of per-layer embeddings is nearly all of it."""
    config = copy.deepcopy(E2B.config)
    config.vocab_size = config.vocab_size_per_layer_input = ROWS
    config.hidden_size_per_layer_input = COLUMNS // config.num_hidden_layers
    return replace(E2B, name="wide", config=config)


def test_the_per_layer_table_is_mapped_and_neither_copied_nor_locked(
    export: Export, tmp_path: Path
) -> None:
    """executorch's Python runtime locks what it maps, if it may."""
    save_tiny(_wide(), tmp_path)
    bundle = export(tmp_path, RECIPE, target="executorch")
    command = [sys.executable, "-c", SCRIPT, str(bundle.directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    added, locked, mapped = json.loads(done.stdout)
    print(f"anonymous {added / MIB:.1f} MiB, mapped {mapped / MIB:.1f} MiB")
    assert mapped > ROWS * COLUMNS
    assert added < ROWS * COLUMNS // 2
    assert locked == 0
