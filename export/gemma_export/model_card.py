"""Writes the README.md and the NOTICE of a bundle on the Hugging Face hub.

All figures come from the manifest, and from a benchmark if there is one.
"""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gemma_export.model.families import FAMILIES
from gemma_runtime.bundle import Bundle
from gemma_runtime.machine import format_bytes
from gemma_runtime.manifest import AttentionKind, Manifest

if TYPE_CHECKING:  # imports numpy
    from gemma_runtime.measure.bench import Benchmark, BundleFigures

TERMS = "https://ai.google.dev/gemma/terms"
# The Gemma Terms of Use ask for a file with this sentence beside the weights.
NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms\n"
)

_PHONES = {
    "onnx": "**Android**: copy the folder to the app in `android_demo/` of gemma-export.",
    "executorch": "**Android, iOS**: copy the folder to the app in `android_demo/` or `ios_demo/` "
    "of gemma-export; or load `{file}` with ExecuTorch's own LLM runners.",
    "coreml": "**iOS, macOS**: copy the folder to the app in `ios_demo/` of gemma-export.",
    "gguf": "**llama.cpp, on computers and boards**: `llama-cli -m {file}`.",
}

# Folders that other programs load; gemma-runtime does not run them.
_TRANSFORMERS = """```sh
pip install {packages}
python -c "
from transformers import pipeline
generate = pipeline('text-generation', '{repo_id}')
print(generate('Once upon a time')[0]['generated_text'])"
```

or with vLLM: `vllm serve {repo_id}`."""


def write_card(bundle: Bundle, repo_id: str, benchmark: "Benchmark | None" = None) -> str:
    """The README.md: metadata for the hub's search, then the text."""
    manifest = bundle.manifest
    sections = [
        _metadata(manifest),
        _introduction(manifest, repo_id),
        _running(manifest, repo_id),
        _quality(bundle),
        *([_speed(benchmark)] if benchmark else []),
        _licence(manifest),
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(manifest: Manifest) -> str:
    model, recipe = manifest.model, manifest.quantization.recipe
    is_hf = manifest.target.name == "hf"
    runtime = manifest.target.packages if is_hf else (manifest.target.name,)
    tags = ["gemma", model.family, *runtime, recipe, "gemma-export", "on-device"]
    link = [f"license_link: {TERMS}"] if has_terms(manifest) else []
    lines = [f"license: {_licence_of(manifest)}", *link, "pipeline_tag: text-generation"]
    if model.revision is not None:  # only a checkpoint from the hub is known by its id there
        lines += [f"base_model: {json.dumps(model.id)}", "base_model_relation: quantized"]
    if manifest.chat_template is not None:
        tags.append("conversational")
    # JSON strings are YAML strings: a recipe's name may hold any character.
    return "\n".join(["---", *lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---"])


def _introduction(manifest: Manifest, repo_id: str) -> str:
    model, quantization = manifest.model, manifest.quantization
    family = FAMILIES[model.family].title if model.family in FAMILIES else model.family
    source = f"`{model.id}`"
    if model.revision is not None:
        page = f"https://huggingface.co/{model.id}"
        commit = f"[`{model.revision[:12]}`]({page}/tree/{model.revision})"
        source = f"[{model.id}]({page}) at commit {commit}"
    cache_bytes = sum(map(manifest.cache_bytes, AttentionKind))
    rows = [
        ("Base model", source),
        ("Family", f"{family}, {model.parameters:,} parameters"),
        ("Runtime", f"{manifest.target.label} {manifest.target.min_runtime_version}".strip()),
        ("Weights", f"{quantization.recipe}, {quantization.bits_per_weight:.2f} bits per weight"),
        ("Context", f"{manifest.context_length} tokens"),
        ("KV caches", f"{manifest.cache_dtype}, {format_bytes(cache_bytes)}"),
        ("Size", format_bytes(sum(file.bytes for file in manifest.files.values()))),
    ]
    title = f"# {repo_id.partition('/')[2]}"
    text = f"{family} for {manifest.target.label}, a bundle written by gemma-export."
    return f"{title}\n\n{text}\n\n{_table(('', ''), rows)}"


def _running(manifest: Manifest, repo_id: str) -> str:
    if manifest.target.name == "hf":
        packages = " ".join(manifest.target.packages)
        return "## How to run it\n\n" + _TRANSFORMERS.format(repo_id=repo_id, packages=packages)
    command = "chat" if manifest.chat_template is not None else "run"
    prompt = "" if command == "chat" else ' "Once upon a time"'
    packages = " ".join(f"'{package}'" for package in manifest.target.packages)
    lines = [
        "## How to run it",
        "**Computers**:",
        f"```sh\npip install 'gemma-export[hub]' {packages}".rstrip()
        + f"\ngemma-runtime verify hub:{repo_id}\n"
        f"gemma-runtime {command} hub:{repo_id}{prompt}\n```",
    ]
    if phone := _PHONES.get(manifest.target.name):
        lines.append(phone.format(file=manifest.graph_files()[0]))
    return "\n\n".join(lines)


def _quality(bundle: Bundle) -> str:
    from gemma_runtime.proof.worst_golden import worst_of_weights  # imports numpy

    manifest, worst = bundle.manifest, worst_of_weights(bundle)
    quality = manifest.quality
    rows = [
        ("Same most likely token", f"{quality.top1:.1%}"),
        ("Mean KL divergence", f"{quality.mean_kl:.4f} nats"),
        ("99th percentile of KL", f"{quality.p99_kl:.3f} nats"),
    ]
    if worst:
        label = f"Mean KL of the worst prompt, `{worst.name}`"
        rows.append((label, f"{worst.mean_kl:.4f} nats"))
    what = "weights" if manifest.int8_caches is None else "weights, with int8 caches,"
    text = f"Distance of these {what} to the float32 weights, over {quality.positions} tokens."
    if worst and manifest.target.name != "hf":  # whose folders gemma-runtime doesn't run
        text += " The mean hides the worst: `gemma-runtime eval` tells it by language."
    return f"## Quality\n\n{text}\n\n{_table(('Figure', 'Value'), rows)}"


def _speed(benchmark: "Benchmark") -> str:
    figures = benchmark.bundles[0]
    text = (
        f"Medians of {benchmark.repeats} on {benchmark.machine.cpu}, {benchmark.threads} threads, "
        f"{benchmark.machine.system}."
    )
    table = _table(("Figure", "Value"), list(_speed_rows(figures)))
    return "\n\n".join(["## Speed", text, table, *(f"Note: {note}" for note in benchmark.warnings)])


def _speed_rows(figures: "BundleFigures") -> Iterator[tuple[str, str]]:
    yield "Load", f"{figures.load_ms.median:.0f} ms"
    for prompt in figures.prompts:
        yield f"First token, {prompt.tokens}-token prompt", f"{prompt.first_token_ms.median:.0f} ms"
    yield "Decode", f"{figures.decode_tokens_per_second.median:.1f} tokens/s"
    yield "Peak memory", format_bytes(figures.peak_rss_bytes.median)


def has_terms(manifest: Manifest) -> bool:
    """Whether the weights are under the Gemma Terms of Use, which ask for the notice."""
    return _licence_of(manifest) == "gemma"


def _licence_of(manifest: Manifest) -> str:
    family = FAMILIES.get(manifest.model.family)
    return "gemma" if family is None else family.licence


def _licence(manifest: Manifest) -> str:
    changes = "exported them to another format"
    if manifest.quantization.recipe != "none":
        changes = "quantized them and " + changes
    if not has_terms(manifest):
        return (
            f"## Licence\n\nThe official weights of {FAMILIES[manifest.model.family].title} are "
            f"under {_licence_of(manifest)}; these files hold modified weights: gemma-export "
            f"{changes}."
        )
    return (
        f"## Licence\n\n{NOTICE.strip()}. The [Gemma Terms of Use]({TERMS}) and the "
        "[prohibited uses](https://ai.google.dev/gemma/prohibited_use_policy) apply to these "
        f"files. They hold modified weights: gemma-export {changes}."
    )


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [header, ("---", "---"), *rows]
    return "\n".join(f"| {label} | {value} |" for label, value in lines)
