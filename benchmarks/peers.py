"""Compares the speed of our bundles with other engines, on the same prompt and threads.

    python benchmarks/peers.py --bundle out/gemma-3-270m-int4 --genai genai_int4 --llama q4_0.gguf
    python benchmarks/peers.py --models out/peers-1b --prompt 128 3900

Each engine runs in its own process, which keeps its model loaded; the engines take turns. All
models must fit into memory together. Install the engines by hand. Only those named on the command
line run:

--models        A folder that peer_models.py wrote: all its models, in the engines installed.
--bundle        A bundle of ours.
--genai         A folder from the model builder of onnxruntime-genai (`pip install
                onnxruntime-genai`); peer_models.py shows how to call it.
--llama         A GGUF file for the xllamacpp wheel, whose kernels use AVX2 at most.
--native        A GGUF file for llama.cpp compiled for this machine (`CMAKE_ARGS=-DGGML_NATIVE=ON
                pip install --no-binary llama-cpp-python llama-cpp-python`).
--openvino      A folder from `optimum-cli export openvino --weight-format int4 --group-size 32
                --sym --ratio 1.0` (`pip install optimum-intel openvino-genai 'transformers<5'` in
                an environment of its own). The table gets 8 bits.
--litert        A folder from `litert-torch export_hf --quantization_recipe=dynamic_wi4b32_afp32
                --cache_length=4096 --prefill_lengths=[128,512]` (`pip install litert-torch
                tensorflow-cpu` in an environment of its own; here only `pip install
                litert-lm-api`). Its memory is measured after its model is closed: only the peak
                says something.
--optimum       A .pte from optimum-executorch 1.1 (`pip install --no-deps`, with torch 2.13),
                exported with `--use_custom_sdpa --use_custom_kv_cache --qlinear 8da4w
                --qembedding 8w`.
--transformers  A checkpoint folder.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import msgspec
from rich.console import Console
from rich.table import Table

_KINDS = ("bundle", "genai", "llama", "native", "openvino", "litert", "optimum", "transformers")
_WARM_UP = 128, 16  # tokens of the prompt, and new ones


@dataclass(frozen=True, slots=True)
class Figures:
    peer: str
    threads: int
    prompt: int  # tokens
    load_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_rss_bytes: int
    anonymous_bytes: int | None  # after the last turn


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path)
    for kind in _KINDS:
        parser.add_argument(f"--{kind}", type=Path, action="append", default=[])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, nargs="+", default=[128])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    requested = {kind: getattr(options, kind) for kind in _KINDS}
    peers = find_models(options.models) if options.models else []
    peers += [(kind, path) for kind, paths in requested.items() for path in paths]
    figures = compare(peers, options.threads, options.prompt, options.new_tokens, options.rounds)
    if options.json:
        sys.stdout.buffer.write(msgspec.json.encode(figures) + b"\n")
    else:
        Console().print(render(figures))


def find_models(folder: Path) -> list[tuple[str, Path]]:
    """What peer_models.py wrote, ours first, for the engines installed here."""
    bundles, ggufs = sorted(folder.glob("onnx-*")), sorted(folder.glob("gguf-*/*.gguf"))
    peers = [("bundle", path) for path in bundles]
    if find_spec("onnxruntime_genai"):
        peers += [("genai", path) for path in sorted(folder.glob("genai-*/"))]
    if find_spec("xllamacpp"):
        peers += [("llama", path) for path in ggufs]
    if find_spec("llama_cpp"):
        peers += [("native", path) for path in ggufs]
    if find_spec("litert_lm"):
        peers += [("litert", path) for path in sorted(folder.glob("litert-*/"))]
    return peers


def compare(
    peers: list[tuple[str, Path]],
    threads: int,
    prompts: Sequence[int],
    new_tokens: int,
    rounds: int,
) -> list[Figures]:
    """Medians over the rounds. Each round starts with another peer; before them all warm up."""
    workers = [_start(kind, path, threads) for kind, path in peers]
    for worker in workers:
        _ask(worker, *_WARM_UP)
    samples: list[list[list[dict[str, float]]]] = [[[] for _ in peers] for _ in prompts]
    for prompt, runs in zip(prompts, samples, strict=True):
        for turn in range(rounds):
            for position in range(len(peers)):
                peer = (turn + position) % len(peers)
                runs[peer].append(_ask(workers[peer], prompt, new_tokens))
    for worker in workers:
        worker.terminate()
    return [
        _figures(_title(kind, path), threads, prompt, new_tokens, runs[peer])
        for prompt, runs in zip(prompts, samples, strict=True)
        for peer, (kind, path) in enumerate(peers)
    ]


def _title(kind: str, path: Path) -> str:
    return f"{kind} {path.parent.name if path.suffix == '.gguf' else path.name}"


def _figures(
    peer: str, threads: int, prompt: int, new_tokens: int, runs: list[dict[str, float]]
) -> Figures:
    last = runs[-1]
    return Figures(
        peer=peer,
        threads=threads,
        prompt=prompt,
        load_seconds=last["load"],
        prefill_tokens_per_second=median(prompt / s["prefill"] for s in runs),
        decode_tokens_per_second=median(new_tokens / s["decode"] for s in runs),
        peak_rss_bytes=int(last["peak"]),
        anonymous_bytes=int(last["anonymous"]) if last["anonymous"] else None,
    )


def render(figures: list[Figures]) -> Table:
    """Each ratio is the speed of the prompt's first row divided by this row's: above 1, the first
    is faster."""
    headings = "prompt", "prefill tokens/s", "decode tokens/s", "load s", "peak MB", "anonymous MB"
    table = Table(title=f"{figures[0].threads} threads; in brackets: speed of the first row / this")
    table.add_column("peer")
    for heading in headings:
        table.add_column(heading, justify="right")
    first = figures[0]
    for f in figures:
        first = first if f.prompt == first.prompt else f
        prefill = first.prefill_tokens_per_second / f.prefill_tokens_per_second
        decode = first.decode_tokens_per_second / f.decode_tokens_per_second
        table.add_row(
            f.peer,
            f"{f.prompt}",
            f"{f.prefill_tokens_per_second:.0f} (×{prefill:.2f})",
            f"{f.decode_tokens_per_second:.1f} (×{decode:.2f})",
            f"{f.load_seconds:.2f}",
            f"{f.peak_rss_bytes / 1e6:.0f}",
            "" if f.anonymous_bytes is None else f"{f.anonymous_bytes / 1e6:.0f}",
        )
    return table


def _start(kind: str, path: Path, threads: int) -> "subprocess.Popen[str]":
    engines = Path(__file__).with_name("peer_engines.py")
    command = [sys.executable, str(engines), kind, str(path), "--threads", str(threads)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    _answer(worker)  # one after the other, or they would slow each other's loading
    return worker


def _ask(worker: "subprocess.Popen[str]", prompt: int, new_tokens: int) -> dict[str, float]:
    assert worker.stdin is not None
    print(prompt, new_tokens, file=worker.stdin, flush=True)
    return _answer(worker)


def _answer(worker: "subprocess.Popen[str]") -> dict[str, float]:
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("figures "):  # other lines are output of libraries
            answer: dict[str, float] = json.loads(line.removeprefix("figures "))
            return answer
    raise SystemExit(f"error: a peer exited with code {worker.wait()}; see its message above")


if __name__ == "__main__":
    main()
