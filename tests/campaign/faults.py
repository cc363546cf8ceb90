"""Calls of the operating system that fail: full disks, input and output errors, a jumping clock."""

import atexit
import ctypes
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from tests.campaign.judge import Tally, Trial

# In the order of the enum in faults.c. The last two are to change nothing.
KINDS = ("full disk", "write error", "read error", "rename error", "short writes", "clock jumps")
_NUMBERS = {
    "full disk": 1,
    "write error": 2,
    "short writes": 3,
    "read error": 4,
    "rename error": 5,
    "clock jumps": 6,
}
_HARMLESS = ("short writes", "clock jumps")
_YEAR = 31_557_600


def is_loaded() -> bool:
    """Whether faults.c is loaded into this process."""
    return hasattr(ctypes.CDLL(None), "arm")


def restart_with_faults(folder: Path) -> str | None:
    """Start this program again with faults.c loaded. Returns a reason if that can't be done."""
    if is_loaded():
        return None
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        return "faults need Linux and a C compiler"
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    built = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], capture_output=True
    )
    if built.returncode:
        return f"faults.c does not compile: {built.stderr.decode().splitlines()[0]}"
    os.environ["LD_PRELOAD"] = str(library)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class Faults:
    """Faults of one trial; counts first how many calls there are."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._calls = {kind: self._count(kind) for kind in KINDS}

    def disturb(self, tally: Tally, kind: str, chance: random.Random) -> None:
        """Run the trial's command with one fault, and look at what is left."""
        if not self._calls[kind]:
            return
        call = chance.randint(1, self._calls[kind])
        jump = chance.choice((-_YEAR, _YEAR))
        self._trial.at.clear(cache=True)
        running = self._trial.start(lambda: self._arm(kind, call, jump))
        ended = running.ended()
        disturbance = f"{kind} at call {call} of {self._calls[kind]}"
        self._trial.check_disturbed(tally, disturbance, ended, honest=True)
        if kind in _HARMLESS and ended.code:
            tally.add(self._trial.scenario.name, disturbance, ["it failed"])
        self._trial.check_again(tally, disturbance)

    def _count(self, kind: str) -> int:
        """How many calls of that kind the undisturbed command makes."""
        at = self._trial.at
        at.clear(cache=True)
        counted = at.folder / "counted"

        def before() -> None:
            self._arm(kind, 0, 0)
            number = ctypes.CDLL(None).counted
            number.restype = ctypes.c_long
            atexit.register(lambda: counted.write_text(str(number())))

        self._trial.start(before).ended()
        return int(counted.read_text())

    def _arm(self, kind: str, call: int, jump: int) -> None:
        at = self._trial.at
        below = os.fsencode(at.folder if kind == "read error" else at.work)
        arm = ctypes.CDLL(None).arm
        arm.argtypes = (ctypes.c_int, ctypes.c_long, ctypes.c_char_p, ctypes.c_long)
        arm(_NUMBERS[kind], call, below, jump)
