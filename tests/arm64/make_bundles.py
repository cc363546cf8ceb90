"""Exports the tiny checkpoint in the formats for which ARM has kernels of its own.

python -m tests.arm64.make_bundles FOLDER
"""

import sys
from pathlib import Path
from shutil import rmtree

from tests.data.tiny_bundle import build

EXPORTS = (("onnx", "int8"), ("onnx", "int4-asym"), ("executorch", "int4"))


def main(folder: Path) -> None:
    rmtree(folder, ignore_errors=True)
    for target, recipe in EXPORTS:
        build(folder / f"{target}-{recipe}", target, recipe)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
