"""What must hold after a disturbed command, and after the same command undisturbed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from gemma_runtime.errors import GemmaError
from tests.campaign.commands import Ended, Running, start
from tests.campaign.scenarios import RUNTIME, Scenario
from tests.campaign.workplace import Workplace


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault of ours."""

    scenario: str
    disturbance: str
    problem: str


@dataclass
class Tally:
    """What happened to the commands of one kind of disturbance."""

    disturbed: int = 0
    stopped: int = 0  # ended without a result
    finished: int = 0  # had its result all the same
    findings: list[Finding] = field(default_factory=list)

    def add(self, scenario: str, disturbance: str, problems: Iterable[str]) -> None:
        self.findings += [Finding(scenario, disturbance, problem) for problem in problems]


@dataclass(frozen=True, slots=True)
class Truth:
    """What an undisturbed command gives."""

    digest: str | None
    said: str | None  # what gemma-runtime says afterwards
    seconds: float


class Trial:
    """One scenario in one workplace, disturbed again and again."""

    def __init__(self, scenario: Scenario, at: Workplace) -> None:
        self.scenario = scenario
        self.at = at
        self.truth = self._first()

    def start(self, before: Callable[[], None] | None = None) -> Running:
        return start(self.scenario.program, self.scenario.arguments(self.at), self.at, before)

    def check_disturbed(self, tally: Tally, disturbance: str, ended: Ended, honest: bool) -> None:
        """No half result. With `honest`, an error is one line and exit code 1."""
        tally.disturbed += 1
        problems = self._damage(may_miss=ended.code != 0)
        if ended.is_hung:
            problems.append("it hung")
        if honest:
            problems += _dishonesty(ended)
        if ended.code == 0:
            tally.finished += 1
        else:
            tally.stopped += 1
        tally.add(self.scenario.name, disturbance, problems)

    def check_again(self, tally: Tally, disturbance: str) -> None:
        """The command alone now gives what it always gives, and leaves nothing unfinished."""
        done = self.scenario.result(self.at) if not self._damage(may_miss=True) else None
        if done is not None:
            self.at.clear(cache=False)
        ended = self.start().ended()
        problems = [] if ended.code == 0 else [f"again: {ended.code}, {_last_line(ended)}"]
        problems += [f"again: {problem}" for problem in self._damage(may_miss=False)]
        problems += [f"again: {name} is left" for name in self.at.leftovers()]
        tally.add(self.scenario.name, disturbance, problems)

    def _first(self) -> Truth:
        self.at.clear(cache=True)
        ended = self.start().ended()
        if ended.code:
            raise SystemExit(f"error: {self.scenario.name} fails undisturbed: {ended.errors}")
        return Truth(self.scenario.result(self.at), self._said(), ended.seconds)

    def _damage(self, may_miss: bool) -> list[str]:
        try:
            digest = self.scenario.result(self.at)
        except GemmaError as error:
            return [f"half a result: {error}"]
        allowed = (self.truth.digest, None) if may_miss else (self.truth.digest,)
        if digest not in allowed:
            return ["another result" if digest else "no result"]
        return [] if self._said() == self.truth.said else ["gemma-runtime says something else"]

    def _said(self) -> str | None:
        if self.scenario.then is None:
            return None
        ended = start(RUNTIME, self.scenario.then(self.at), self.at).ended()
        return ended.output if ended.code == 0 else f"{ended.code}: {ended.errors}"


def _dishonesty(ended: Ended) -> list[str]:
    """What is wrong with how a command reported its failure."""
    if ended.code == 0:
        return []
    errors = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    if "Traceback" in ended.errors:
        return [f"a traceback: {_last_line(ended)}"]
    if ended.code != 1 or len(errors) != 1:
        return [f"exit code {ended.code} with {len(errors)} lines of error: {_last_line(ended)}"]
    return []


def _last_line(ended: Ended) -> str:
    lines = ended.errors.strip().splitlines()
    return lines[-1] if lines else "nothing was said"
