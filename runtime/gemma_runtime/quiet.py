"""Keeps libraries from telling users what only their own developers can mend."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import IO
from warnings import catch_warnings, simplefilter


@contextmanager
def quiet() -> Iterator[None]:
    """No Python warnings, and no log below an error."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with catch_warnings():
            simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def captured_stderr() -> Iterator[IO[bytes]]:
    """A file that takes what native code writes to the process's standard error meanwhile."""
    sys.stderr.flush()
    kept = os.dup(2)
    with TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
