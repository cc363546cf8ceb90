"""Silences libraries' warnings that users can't act on."""

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
    """Suppress Python warnings, and log records below ERROR."""
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
    """Redirect the process's standard error, native code's included, to the file it yields."""
    sys.stderr.flush()
    original = os.dup(2)
    with TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            os.close(original)
