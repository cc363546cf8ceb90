"""Parameters that several commands of `gemma-runtime` take."""

from pathlib import Path
from typing import Annotated

import typer


def _check_threads(threads: int | None) -> int | None:
    """Refuse too many threads before the bundle is read."""
    if threads is not None:
        from gemma_runtime.machine import check_threads

        check_threads(threads)
    return threads


def bundle_folder(text: str) -> Path:
    """The folder of a bundle; one given as `hub:OWNER/NAME` is downloaded first."""
    from gemma_runtime.hub import HUB_PREFIX, fetch_bundle

    is_on_hub = text.startswith(HUB_PREFIX)
    return fetch_bundle(text.removeprefix(HUB_PREFIX)) if is_on_hub else Path(text)


BundlePath = Annotated[
    Path,
    typer.Argument(
        metavar="BUNDLE",
        parser=bundle_folder,
        help="The bundle's folder, or hub:OWNER/NAME\\[@REVISION].",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, callback=_check_threads, help="Number of threads. \\[physical cores]"),
]
Json = Annotated[bool, typer.Option("--json", help="Figures as JSON on stdout.")]
