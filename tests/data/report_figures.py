"""Records figures of the committed tiny bundle, as the commands print them, for tests of the page.

    python tests/data/report_figures.py

Run it again when the bundle or the JSON of a command changes. Needs the extra `eval`. The system's
name is shortened, because it names the machine where this ran.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_BUNDLE, _FOLDER = _HERE / "tiny", _HERE / "report"
_QUESTIONS = ("the sun is", "the king in the", "user in the ring", "the thing is")
_TEXTS = {"en": "the king in the user thing, and the ring.", "de": "das ist ein Ding, ja."}


def main() -> None:
    _FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _keep("verify", "verify", "tiny")
        _keep("inspect", "inspect", "tiny")
        _keep("bench", "bench", "tiny", "--repeats", "2", "--new-tokens", "8")
        _keep("sustained", "bench", "tiny", "--sustained", "0.05", "--new-tokens", "8")
        _write_inputs(folder)
        _keep("eval", "eval", "tiny", "--text", folder / "texts", "--noise")
        prompts = ("--prompts", folder / "prompts.txt", "--replies", "2")
        _keep("safety", "safety", "tiny", *prompts)
        for run, chunk, exact in (("a", "16", True), ("b", "16", False), ("again", "8", False)):
            task = ("--include", folder, "--tasks", "tiny_task", "--chunk", chunk)
            kind = ["--exact"] if exact else []
            _run("lm-eval", "tiny", *task, *kind, "--output", folder / run)
        _keep("compare", "compare", folder / "a", folder / "b", "--noise", folder / "again")
        (results,) = (folder / "b").rglob("results_*.json")
        _write("results", json.loads(results.read_bytes()))
    _write("phone", _phone_report())


def _phone_report() -> dict[str, object]:
    """A phone app's report: the fields of its sources, with figures recorded here."""
    parts = {
        name: json.loads((_FOLDER / f"{name}.json").read_bytes()) for name in ("verify", "bench")
    }
    fields = json.loads((_HERE / "phone_vectors.json").read_bytes())["fields"]
    verify = {name: parts["verify"][name] for name in fields["Verification"]}
    speed = parts["bench"]["bundles"][0]
    kept = [*("bundle", "model", "recipe", "target", "artifact_bytes", "cache_bytes", "load_ms")]
    kept += ["prompts", "decode_tokens_per_second", "token_ms", "token_p95_ms", "peak_rss_bytes"]
    rates = (20.0, 20.0, 16.0, 12.0)
    thermal = ("none", "none", "moderate", "moderate")
    spans = [
        {
            "seconds": 5.0 * (index + 1),
            "tokens_per_second": rate,
            "thermal": thermal[index],
            "memory_bytes": 300_000_000 + index * 1_000_000,
        }
        for index, rate in enumerate(rates)
    ]
    return {
        "device": {
            **{"manufacturer": "Maker", "model": "Phone 1", "android": "16", "threads": "4"},
            **{"runtime": "ONNX Runtime 1.29.0", "app": "0.1.0"},
            **{"start_battery_percent": "80", "start_charging": "false"},
            **{"start_power_save": "false", "start_thermal_status": "0"},
            **{"end_battery_percent": "78", "end_charging": "false"},
            **{"end_power_save": "false", "end_thermal_status": "2"},
        },
        "bundle": "tiny",
        "digest": parts["verify"]["digest"],
        "codes_digest": json.loads((_BUNDLE / "manifest.json").read_bytes())["quantization"][
            "codes_digest"
        ],
        "verify": verify,
        "bench": {
            "threads": 4,
            "repeats": 3,
            "new_tokens": 48,
            "bundles": [{name: speed[name] for name in kept}],
        },
        "sustained": {
            "sustained_minutes": 0.3,
            "round_tokens": 8,
            "prompt_tokens": 88,
            "new_tokens": 340,
            "first": rates[0],
            "last": rates[-1],
            "lowest": min(rates),
            "spans": spans,
        },
    }


def _write_inputs(folder: Path) -> None:
    (folder / "prompts.txt").write_text("\n".join(_QUESTIONS) + "\n", "utf-8")
    (folder / "texts").mkdir()
    for language, text in _TEXTS.items():
        (folder / f"texts/{language}.txt").write_text(text, "utf-8")
    rows = [
        {"question": question, "choices": ["a thing", "the ring"], "answer": index % 2}
        for index, question in enumerate(_QUESTIONS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    task = {
        "task": "tiny_task",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "tiny_task.yaml").write_text(json.dumps(task), "utf-8")  # JSON is YAML


def _keep(name: str, *arguments: str | Path) -> None:
    _write(name, json.loads(_run(*arguments, "--json")))


def _write(name: str, figures: object) -> None:
    text = json.dumps(_without_system(figures), indent=1, ensure_ascii=False)
    (_FOLDER / f"{name}.json").write_text(text + "\n", "utf-8")


def _without_system(value: object) -> object:
    if isinstance(value, dict):
        return {k: "Linux" if k == "system" else _without_system(v) for k, v in value.items()}
    return [_without_system(part) for part in value] if isinstance(value, list) else value


def _run(*arguments: str | Path) -> bytes:
    start = "from gemma_runtime.start import main; main()"
    command = [sys.executable, "-c", start, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=_HERE, stdout=subprocess.PIPE, check=True, env=environment)
    return done.stdout


if __name__ == "__main__":
    main()
