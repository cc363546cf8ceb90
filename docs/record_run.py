"""Records the picture of a real run: `gemma-runtime verify` and `run` on a bundle, as an SVG.

    python docs/record_run.py out/gemma-3-270m-demo

The commands run in the bundle's grandparent folder, so the picture shows no path of this machine.
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    bundle = parser.parse_args().bundle.resolve()
    folder, shown = bundle.parents[1], f"{bundle.parent.name}/{bundle.name}"
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=_WIDTH, file=nowhere, force_terminal=True)
        for arguments in (["verify", shown], ["run", shown, _PROMPT, "--max-new-tokens", "24"]):
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
        stderr=subprocess.DEVNULL,  # speed: it tells of the moment's load
        text=True,
        check=True,
    )
    console.print(Text.from_ansi(done.stdout.rstrip()))
    console.print()


def without_downloads(svg: str) -> str:
    """The picture in the reader's own monospaced font: rich's would come from a server."""
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code", "ui-monospace, Menlo, Consolas")


if __name__ == "__main__":
    main()
