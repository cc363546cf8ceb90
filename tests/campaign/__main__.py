"""Disturbs commands on a tiny model, and checks that nothing half-made is left.

    python -m tests.campaign out/campaign --kills 300 --faults 300

Kills come at random moments. Faults are failing calls of the operating system: full disks, input
and output errors, short writes, a jumping clock. After each, there must be no half result, and the
command alone must give the very result that it always gives. The exit code is 1 if not.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.campaign.commands import import_all
from tests.campaign.faults import KINDS, Faults, is_loaded, restart_with_faults
from tests.campaign.judge import Tally, Trial
from tests.campaign.kills import kill
from tests.campaign.scenarios import CARELESS, SCENARIOS, Scenario
from tests.campaign.workplace import make_workplace


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a new folder for models and results")
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    parser.add_argument("--json", action="store_true", help="figures as JSON on stdout")
    options = parser.parse_args()
    folder = options.folder.resolve()  # faults.c compares the paths that commands name
    folder.mkdir(parents=True, exist_ok=is_loaded())
    reason = restart_with_faults(folder) if options.faults else None
    if reason:
        print(f"SKIPPED: faults: {reason}", file=sys.stderr)
    faults = 0 if reason else options.faults
    chosen = [one for one in SCENARIOS if options.only in one.name]
    if options.only == CARELESS.name:
        chosen = [CARELESS]
    if not chosen:
        names = ", ".join(one.name for one in SCENARIOS)
        parser.error(f"--only {options.only!r} is in the name of no scenario: {names}")
    tallies = run(folder, chosen, options.kills, faults, options.seed)
    if options.json:
        print(json.dumps({name: asdict(tally) for name, tally in tallies.items()}))
    else:
        _show(tallies)
    return int(any(tally.findings for tally in tallies.values()))


def run(
    folder: Path, scenarios: Sequence[Scenario], kills: int, faults: int, seed: int
) -> dict[str, Tally]:
    """So many kills and faults, the scenarios in turn. Figures by kind of disturbance."""
    import_all()
    at = make_workplace(folder)
    chance = random.Random(seed)
    tallies = {kind: Tally() for kind in ("kill", *KINDS)}
    for place, scenario in enumerate(scenarios):
        trial = Trial(scenario, at)
        for number in range(place, kills, len(scenarios)):
            known = len(tallies["kill"].findings)
            kill(trial, tallies["kill"], chance)
            _tell(scenario, "kill", number, kills, tallies["kill"], known)
        if place < faults:
            suffering = Faults(trial)
            for number in range(place, faults, len(scenarios)):
                kind = KINDS[number // len(scenarios) % len(KINDS)]
                known = len(tallies[kind].findings)
                suffering.disturb(tallies[kind], kind, chance)
                _tell(scenario, kind, number, faults, tallies[kind], known)
    return tallies


def _tell(scenario: Scenario, kind: str, number: int, of: int, tally: Tally, known: int) -> None:
    """A line of progress, and the findings that are new."""
    print(f"{scenario.name}: {kind} {number + 1} of {of}", file=sys.stderr)
    for one in tally.findings[known:]:
        print(f"  {one.disturbance}: {one.problem}", file=sys.stderr)


def _show(tallies: dict[str, Tally]) -> None:
    print("| disturbance | commands | stopped | finished | findings |")
    print("|---|---|---|---|---|")
    for kind, tally in tallies.items():
        figures = (tally.disturbed, tally.stopped, tally.finished, len(tally.findings))
        print(f"| {kind} |", " | ".join(map(str, figures)), "|")
    for tally in tallies.values():
        for one in tally.findings:
            print(f"{one.scenario}, {one.disturbance}: {one.problem}")


if __name__ == "__main__":
    sys.exit(main())
