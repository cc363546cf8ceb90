"""The console script `gemma-runtime`. Ctrl-C ends it quietly, also while modules are imported."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


def main() -> None:
    with ending_at_once():
        from gemma_runtime import cli
    cli.main()


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Until the block ends, Ctrl-C exits with 130, as there is nothing to clean up yet."""
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default:  # background jobs of a shell ignore it
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    yield
    if is_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
