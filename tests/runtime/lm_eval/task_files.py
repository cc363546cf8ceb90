"""Writes tasks of every kind that lm_eval knows, with questions out of a few words."""

import json
import random
from pathlib import Path

_WORDS = ("the", "user", "in", "this", "the", "ing", "inth", "use", "er", "us")
_KINDS: dict[str, dict[str, object]] = {
    "letters": {
        "output_type": "multiple_choice",
        "doc_to_choice": ["A", "B", "C"],
        "metric_list": [{"metric": "acc"}],
    },
    "texts": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "replies": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": [" in"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}
KINDS = (*_KINDS,)


def write_tasks(folder: Path, questions: int = 12, longest: int = 30, shots: int = 1) -> Path:
    """Tasks named as KINDS. JSON is YAML, too."""
    draw = random.Random(1)
    folder.mkdir(parents=True)
    data = folder / "questions.jsonl"
    rows = [
        {
            "question": " ".join(draw.choices(_WORDS, k=draw.randint(2, longest))),
            "choices": [" ".join(draw.choices(_WORDS, k=draw.randint(1, 4))) for _ in "ABC"],
            "answer": draw.randrange(3),
            "subject": f"s{number % 4}",
        }
        for number in range(questions)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "metadata": {"version": 1.0},
    }
    for name, kind in _KINDS.items():
        task = {**shared, **kind, "task": name, "num_fewshot": 0 if name == "rolling" else shots}
        (folder / f"{name}.yaml").write_text(json.dumps(task), "utf-8")
    return folder
