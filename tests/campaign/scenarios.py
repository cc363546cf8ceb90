"""The commands that the campaign disturbs, and what their results are."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.campaign.workplace import Workplace, bundle_digest, file_digest

RUNTIME = "gemma_runtime.cli:run_command"


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    program: str  # MODULE:FUNCTION that takes the arguments and returns the exit code
    arguments: Callable[[Workplace], list[str]]
    result: Callable[[Workplace], str | None]  # its digest, None without one; raises if damaged
    then: Callable[[Workplace], list[str]] | None = None  # what gemma-runtime says afterwards


def _export(name: str, target: str, *flags: str) -> Scenario:
    def arguments(at: Workplace) -> list[str]:
        model = ["--checkpoint", str(at.checkpoint), "--output", str(at.result)]
        text = ["--calibration", str(at.text)] if "gptq" in name else []
        lengths = ["--context", "64", "--prefill", "8"]
        return ["--target", target, *model, *text, *lengths, *flags, "--json"]

    return Scenario(name, "gemma_export.cli:run", arguments, lambda at: bundle_digest(at.result))


def _run(at: Workplace, *flags: str) -> list[str]:
    words = ["run", str(at.bundle), "hello", "--max-new-tokens", "8", "--threads", "1"]
    return [*words, "--temperature", "0", *flags]


SCENARIOS = (
    _export("export onnx", "onnx", "--quant", "int4"),
    _export("export onnx, gptq", "onnx", "--quant", "int4-gptq"),
    _export("export gguf", "gguf", "--quant", "int8"),
    _export("export coreml", "coreml", "--quant", "int4"),
    _export("export hf", "hf", "--quant", "int8"),
    Scenario(
        name="pack",
        program=RUNTIME,
        arguments=lambda at: ["pack", str(at.bundle), "--json"],
        result=lambda at: None,  # lies in the cache; `then` tells whether sessions take it rightly
        then=_run,
    ),
    Scenario(
        name="bake",
        program=RUNTIME,
        arguments=lambda at: ["bake", str(at.bundle), str(at.result), "--text", str(at.opening)],
        result=lambda at: file_digest(at.result),
    ),
)

# Not one of ours: shows that the campaign finds what it looks for.
CARELESS = Scenario(
    name="careless",
    program="tests.campaign.careless:run",
    arguments=lambda at: [str(at.bundle), str(at.result)],
    result=lambda at: bundle_digest(at.result),
)
