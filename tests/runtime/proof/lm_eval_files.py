"""Writes folders as lm_eval 0.4.13 does."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path


def digest(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def choice_sample(
    question: str,
    likelihoods: Sequence[float],
    target: int | str,
    right: int,
    *,
    prompt: str = "",
    subject: str | None = None,
) -> dict[str, object]:
    """A multiple-choice question with the choices A, B, C, …"""
    doc = {"question": question} | ({} if subject is None else {"subject": subject})
    pairs = [[str(x), "False"] for x in likelihoods]
    best = max(range(len(likelihoods)), key=lambda i: likelihoods[i])
    return {
        "doc": doc,
        "target": str(target),
        "arguments": {
            f"gen_args_{i}": {"arg_0": prompt + question, "arg_1": f" {chr(65 + i)}"}
            for i in range(len(pairs))
        },
        "resps": [[pair] for pair in pairs],
        "filtered_resps": pairs,
        "filter": "none",
        "metrics": ["acc"],
        "doc_hash": digest(doc),
        "prompt_hash": digest(prompt + question),
        "target_hash": digest(target),
        "acc": float(best == right),
    }


def text_sample(question: str, reply: str, right: bool, filter: str = "none") -> dict[str, object]:
    return {
        "doc": {"question": question},
        "target": "42",
        "arguments": {"gen_args_0": {"arg_0": question, "arg_1": {"until": ["\n"]}}},
        "resps": [[reply]],
        "filtered_resps": [reply],
        "filter": filter,
        "metrics": ["exact_match"],
        "doc_hash": digest(question),
        "prompt_hash": digest(question),
        "target_hash": digest("42"),
        "exact_match": float(right),
    }


def write_run(
    folder: Path,
    tasks: Mapping[str, Sequence[Mapping[str, object]]],
    *,
    config: Mapping[str, object] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    date: str = "2026-11-28T00-32-52.006730",
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "results": {},
        "group_subtasks": {task: [] for task in tasks} | dict(groups or {}),
        "configs": {task: {"task": task} for task in tasks},
        "config": {"model": "hf", "model_args": f"pretrained={folder.name}", **(config or {})},
    }
    (folder / f"results_{date}.json").write_text(json.dumps(results), "utf-8")
    for task, samples in tasks.items():
        lines = (json.dumps({"doc_id": i, **sample}) for i, sample in enumerate(samples))
        (folder / f"samples_{task}_{date}.jsonl").write_text("\n".join(lines), "utf-8")
    return folder
