"""Compares the speed of our bundles with other engines, on the same prompt and threads.

    python benchmarks/peers.py --bundle out/gemma-3-270m-int4 --genai genai_int4 --llama q4_0.gguf

Each engine runs in its own process, which keeps its model loaded; the engines take turns. Install
the engines by hand. Only those named on the command line run:

--bundle        A bundle of ours.
--genai         A folder from the model builder of onnxruntime-genai (`pip install
                onnxruntime-genai`). With transformers 5, flatten Gemma 3's nested
                `rope_parameters` before the builder's `Gemma3Model` reads them.
--llama         A GGUF file for the xllamacpp wheel, whose kernels use AVX2 at most.
--native        A GGUF file for llama.cpp compiled for this machine (`CMAKE_ARGS=-DGGML_NATIVE=ON
                pip install --no-binary :all: llama-cpp-python`).
--optimum       A .pte from optimum-executorch 1.1 (`pip install --no-deps`, with torch 2.13),
                exported with `--use_custom_sdpa --use_custom_kv_cache --qlinear 8da4w
                --qembedding 8w`.
--transformers  A checkpoint folder.

The timed loop is a graph call and an argmax for --bundle, --optimum, --native and --transformers;
the generator's greedy search for --genai; and, for --llama, a request to its server, with sampler
and detokenizer, timed by that server.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

Serve = Callable[[list[int], int], tuple[float, float]]  # (prompt, new tokens) → seconds for each


@dataclass(frozen=True, slots=True)
class Figures:
    peer: str
    threads: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_rss_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, action="append", default=[])
    parser.add_argument("--genai", type=Path, action="append", default=[])
    parser.add_argument("--llama", type=Path, action="append", default=[])
    parser.add_argument("--native", type=Path, action="append", default=[])
    parser.add_argument("--optimum", type=Path, action="append", default=[])
    parser.add_argument("--transformers", type=Path, action="append", default=[])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", nargs=2, metavar=("KIND", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], Path(options.serve[1]), options.threads)
        return
    requested = {kind: getattr(options, kind) for kind in OPENERS}
    peers = [(kind, path) for kind, paths in requested.items() for path in paths]
    figures = compare(peers, options.threads, options.prompt, options.new_tokens, options.rounds)
    if options.json:
        sys.stdout.buffer.write(msgspec.json.encode(figures) + b"\n")
    else:
        Console().print(render(figures))


def compare(
    peers: list[tuple[str, Path]], threads: int, prompt: int, new_tokens: int, rounds: int
) -> list[Figures]:
    """Medians over the rounds. Each round starts with another peer; the first only warms up."""
    workers = [_start(kind, path, threads) for kind, path in peers]
    samples: list[list[dict[str, float]]] = [[] for _ in peers]
    for turn in range(rounds + 1):
        for position in range(len(peers)):
            peer = (turn + position) % len(peers)
            seconds = _ask(workers[peer], prompt, new_tokens)
            if turn:
                samples[peer].append(seconds)
    for worker in workers:
        worker.terminate()
    return [
        Figures(
            peer=f"{kind} {path.name}",
            threads=threads,
            prefill_tokens_per_second=median(prompt / s["prefill"] for s in runs),
            decode_tokens_per_second=median(new_tokens / s["decode"] for s in runs),
            peak_rss_bytes=int(runs[-1]["peak"]),
        )
        for (kind, path), runs in zip(peers, samples, strict=True)
    ]


def render(figures: list[Figures]) -> Table:
    """Each ratio is the first row's speed divided by this row's: above 1, the first is faster."""
    table = Table(title=f"{figures[0].threads} threads; in brackets: speed of the first row / this")
    for heading in ("peer", "prefill tokens/s", "decode tokens/s", "peak MB"):
        table.add_column(heading, justify="left" if heading == "peer" else "right")
    first = figures[0]
    for f in figures:
        prefill = first.prefill_tokens_per_second / f.prefill_tokens_per_second
        decode = first.decode_tokens_per_second / f.decode_tokens_per_second
        table.add_row(
            f.peer,
            f"{f.prefill_tokens_per_second:.0f} (×{prefill:.2f})",
            f"{f.decode_tokens_per_second:.1f} (×{decode:.2f})",
            f"{f.peak_rss_bytes / 1e6:.0f}",
        )
    return table


def serve(kind: str, path: Path, threads: int) -> None:
    """Answer each line `PROMPT_LENGTH NEW_TOKENS` on stdin with a line of JSON."""
    # gemma_runtime first: it opts out of telemetry before the peer's library is loaded.
    from gemma_runtime.machine import peak_rss_bytes

    run = OPENERS[kind](path, threads)
    for line in sys.stdin:
        length, new = map(int, line.split())
        ids = [2, *map(int, np.random.default_rng(1).integers(1000, 200000, length - 1))]
        prefill, decode = run(ids, new)
        answer = {"prefill": prefill, "decode": decode, "peak": peak_rss_bytes()}
        print("figures " + json.dumps(answer), flush=True)


def _open_ours(path: Path, threads: int) -> Serve:
    from gemma_runtime import open_bundle, open_session

    session = open_session(open_bundle(path), threads)

    def run(prompt: list[int], new: int) -> tuple[float, float]:
        session.reset()
        started = perf_counter()
        token = int(session.prefill(prompt).argmax())
        filled = perf_counter()
        for _ in range(new):
            token = int(session.decode(token).argmax())
        return filled - started, perf_counter() - filled

    return run


def _open_genai(path: Path, threads: int) -> Serve:
    import onnxruntime_genai as genai

    config = genai.Config(str(path))
    config.overlay(
        json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}})
    )
    model = genai.Model(config)

    def run(prompt: list[int], new: int) -> tuple[float, float]:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=len(prompt) + new + 520)
        generator = genai.Generator(model, parameters)
        started = perf_counter()
        generator.append_tokens(np.array(prompt, np.int32))
        generator.generate_next_token()
        filled = perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        return filled - started, perf_counter() - filled

    return run


def _open_llama(path: Path, threads: int) -> Serve:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 2048, 1, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.verbosity, parameters.cache_ram_mib = 0, 0
    server = xllamacpp.Server(parameters)

    def run(prompt: list[int], new: int) -> tuple[float, float]:
        request = {
            "prompt": prompt,
            "n_predict": new,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": False,
        }
        answer = server.handle_completions(request)
        content = json.loads(answer) if isinstance(answer, str | bytes) else answer
        timings = content["timings"]
        return timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3

    return run


def _open_native(path: Path, threads: int) -> Serve:
    import llama_cpp as llama

    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    parameters = llama.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = 2048, 512, 512
    parameters.n_threads = parameters.n_threads_batch = threads
    context = llama.llama_init_from_model(model, parameters)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def step(tokens: list[int]) -> int:
        array = (llama.llama_token * len(tokens))(*tokens)
        if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))) != 0:
            raise SystemExit(f"error: llama.cpp failed to decode {len(tokens)} tokens")
        logits = llama.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

    def run(prompt: list[int], new: int) -> tuple[float, float]:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        started = perf_counter()
        token = step(prompt)
        filled = perf_counter()
        for _ in range(new):
            token = step([token])
        return filled - started, perf_counter() - filled

    return run


def _open_optimum(path: Path, threads: int) -> Serve:
    import executorch.kernels.quantized  # noqa: F401  registers embedding_byte
    import optimum.exporters.executorch.__main__  # noqa: F401  registers custom_sdpa
    import torch
    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(threads)
    module = portable_lib._load_for_executorch(str(path))

    def step(tokens: list[int], position: int) -> int:
        positions = torch.arange(position, position + len(tokens))
        (logits,) = module.run_method("forward", (torch.tensor([tokens]), positions))
        return int(logits[0, -1].argmax())

    def run(prompt: list[int], new: int) -> tuple[float, float]:
        started = perf_counter()
        token = step(prompt, 0)
        filled = perf_counter()
        for position in range(len(prompt), len(prompt) + new):
            token = step([token], position)
        return filled - started, perf_counter() - filled

    return run


def _open_transformers(path: Path, threads: int) -> Serve:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")

    @torch.inference_mode()
    def run(prompt: list[int], new: int) -> tuple[float, float]:
        started = perf_counter()
        out = model(torch.tensor([prompt]), logits_to_keep=1)
        filled = perf_counter()
        for _ in range(new):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values)
        return filled - started, perf_counter() - filled

    return run


OPENERS: dict[str, Callable[[Path, int], Serve]] = {
    "bundle": _open_ours,
    "genai": _open_genai,
    "llama": _open_llama,
    "native": _open_native,
    "optimum": _open_optimum,
    "transformers": _open_transformers,
}


def _start(kind: str, path: Path, threads: int) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "--threads", str(threads), "--serve", kind, str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(worker: "subprocess.Popen[str]", prompt: int, new_tokens: int) -> dict[str, float]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    print(prompt, new_tokens, file=worker.stdin, flush=True)
    for line in worker.stdout:
        if line.startswith("figures "):  # other lines are output of libraries
            answer: dict[str, float] = json.loads(line.removeprefix("figures "))
            return answer
    raise SystemExit(f"error: a peer exited with code {worker.wait()}; see its message above")


if __name__ == "__main__":
    main()
