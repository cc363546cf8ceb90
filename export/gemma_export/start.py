"""The console script `gemma-export`. Ctrl-C ends it quietly, also while modules are imported."""

from gemma_runtime.start import ending_at_once


def main() -> None:
    with ending_at_once():
        from gemma_export import cli
    cli.main()
