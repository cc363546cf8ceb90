"""A command that the campaign must find at fault: it writes a bundle file by file, in place."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path


def run(arguments: Sequence[str]) -> int:
    """Copy a bundle, the manifest first."""
    source, output = map(Path, arguments)
    output.mkdir(exist_ok=True)
    for file in sorted(source.iterdir(), key=lambda path: path.name != "manifest.json"):
        shutil.copyfile(file, output / file.name)
        time.sleep(0.02)
    return 0
