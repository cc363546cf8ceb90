"""`optimum-cli export gemma`: the arguments of gemma-export under optimum's command line.

optimum looks for such files in the namespace package `optimum.commands.register`, which every
distribution may add to: the wheel puts this file beside optimum's own, an editable install adds its
folder to the path. No folder above may hold an `__init__.py`, which would hide optimum's modules.
"""

import sys
from argparse import REMAINDER, ArgumentParser
from typing import NoReturn

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class GemmaExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    COMMAND = CommandInfo(name="gemma", help="Export Gemma, as the command gemma-export does.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Take every argument as it is, --help included: gemma-export reads them."""
        # argparse would take the first option for its own. To this parser, nothing is an option.
        parser.prefix_chars = "\0"
        parser.add_argument("arguments", nargs=REMAINDER)

    def run(self) -> NoReturn:
        # Imported here: optimum imports this file for each of its commands.
        from gemma_export.cli import run

        sys.exit(run(self.args.arguments))


REGISTER_COMMANDS = [(GemmaExportCommand, ExportCommand)]
