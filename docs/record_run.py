"""Records `gemma-runtime verify` and `gemma-runtime run` on a bundle as an SVG picture.

    python docs/record_run.py out/gemma-3-270m-demo

The commands run two folders above the bundle, so the picture shows only a short relative path.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).parent / "assets" / "run.svg"
_PROMPT = "The three primary colours are"
_WIDTH = 84


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    bundle = parser.parse_args().bundle.resolve()
    folder, path = bundle.parents[1], f"{bundle.parent.name}/{bundle.name}"
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=_WIDTH, file=nowhere, force_terminal=True)
        for arguments in (["verify", path], ["run", path, _PROMPT, "--max-new-tokens", "24"]):
            _show(console, arguments, folder)
        svg = console.export_svg(title="gemma-runtime", unique_id="run")
    PICTURE.write_text(without_downloads(svg), "utf-8")


def _show(console: Console, arguments: list[str], folder: Path) -> None:
    words = (f'"{word}"' if " " in word else word for word in arguments)
    console.print(Text(f"$ gemma-runtime {' '.join(words)}", style="bold"))
    done = subprocess.run(
        [sys.executable, "-c", "from gemma_runtime.cli import main; main()", *arguments],
        cwd=folder,
        env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(_WIDTH)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # omits the speed, which depends on this machine's load
        text=True,
        check=True,
    )
    console.print(Text.from_ansi(done.stdout.rstrip()))
    console.print()


def without_downloads(svg: str) -> str:
    """Use the reader's monospaced font: rich's font would be loaded from a server."""
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code", "ui-monospace, Menlo, Consolas")


if __name__ == "__main__":
    main()
