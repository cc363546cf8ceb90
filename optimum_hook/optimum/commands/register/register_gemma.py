"""Adds the command `optimum-cli export gemma`, which passes its arguments to gemma-export.

optimum imports every module in the namespace package `optimum.commands.register`. The wheel
installs this file there; an editable install adds its folder to the path. None of the folders above
may contain an `__init__.py`: it would hide optimum's own modules.
"""

import sys
from argparse import REMAINDER, ArgumentParser
from typing import NoReturn

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class GemmaExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    COMMAND = CommandInfo(name="gemma", help="Export Gemma with gemma-export.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Pass all arguments, including --help, to gemma-export unchanged."""
        # REMAINDER alone does not catch a leading option; with this prefix, nothing is an option.
        parser.prefix_chars = "\0"
        parser.add_argument("arguments", nargs=REMAINDER)

    def run(self) -> NoReturn:
        # Imported here because every optimum command imports this file.
        from gemma_export.cli import run

        sys.exit(run(self.args.arguments))


REGISTER_COMMANDS = [(GemmaExportCommand, ExportCommand)]
