"""Feeds damaged inputs to every reader of untrusted bytes.

    python -m tests.fuzz --runs 20000
    python -m tests.fuzz --reader gguf --runs 2000000 --json

An input must give a result or one line of the project's own errors, within 5 seconds and 256 MiB.
With atheris installed, inputs that reach new code are kept and changed further; without it they are
changes of the seeds. The exit code is 1 if there are findings; their inputs are kept in a folder.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tests.fuzz.campaign import Finding, Tally, has_atheris, run_reader


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20_000, help="inputs for each reader")
    parser.add_argument("--seconds", type=float, default=0, help="for each reader; 0: no limit")
    parser.add_argument("--reader", default="", help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("out/fuzz"), metavar="FOLDER")
    parser.add_argument("--json", action="store_true", help="figures as JSON on stdout")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        run_reader(options.reader, options.runs, options.seconds, options.seed, options.findings)
    names = _names()
    if options.reader and options.reader not in names:
        parser.error(f"--reader {options.reader!r} is none of: {', '.join(names)}")
    if not has_atheris():
        print("atheris is not installed: changes by chance alone", file=sys.stderr)
    tallies = []
    for name in [options.reader] if options.reader else names:
        tallies.append(_run(name, sys.argv[1:], options.findings))
        if not options.json:
            _show(tallies[-1], is_first=len(tallies) == 1)
    if options.json:
        sys.stdout.buffer.write(msgspec.json.encode(tallies) + b"\n")
    return int(any(tally.findings for tally in tallies))


def _names() -> list[str]:
    from tests.fuzz.readers import READERS

    return list(READERS)


def _run(name: str, flags: Sequence[str], kept: Path) -> Tally:
    """One reader in a process of its own, so that a crash is a finding and not the end."""
    command = [sys.executable, "-m", "tests.fuzz", *flags, "--reader", name, "--here"]
    done = subprocess.run(command, capture_output=True)
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return msgspec.json.decode(lines[-1], type=Tally)
    last = done.stderr.decode("utf-8", "replace").strip()[-500:]
    ended = Finding(f"the process ended with {done.returncode}: {last}", "")
    return Tally(name, "", findings=[ended])


def _show(tally: Tally, is_first: bool) -> None:
    if is_first:
        print("| reader | inputs | accepted | slowest, s | most memory, MiB | findings |")
        print("|---|---|---|---|---|---|")
    figures = (tally.reader, tally.runs, tally.accepted, f"{tally.slowest_seconds:.2f}")
    print("|", " | ".join(map(str, figures)), end=" | ")
    print(tally.most_added_bytes >> 20, "|", len(tally.findings), "|", flush=True)
    for one in tally.findings:
        print(f"{tally.reader}: {one.problem} ({one.file})", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
