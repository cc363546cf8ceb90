"""Runs one engine with one model for `peers.py`, which starts this file once for each of them.

    echo 128 64 | python benchmarks/peer_engines.py bundle out/gemma-3-270m-int4

Each line on stdin has a number of prompt tokens and a number of new tokens; the answer is a line
with the seconds of both, and memory. A first line says that the model is loaded.

The timed loop is a graph call and an argmax for --bundle, --optimum, --native and --transformers;
the generator's greedy search for --genai and --openvino; for --llama, a request to its server, with
sampler and detokenizer, timed by that server; and what its own benchmark says for --litert.

Loading includes the import of the engine. Anonymous memory is what the process holds after its last
turn besides mapped files: heap, caches, weights that the engine repacked.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np

_CONTEXT = 4096  # tokens of llama.cpp's caches, as in a bundle by default
_BATCH = 512  # longest chunk of a prompt there, as in a bundle by default

Serve = Callable[[list[int], int], tuple[float, float]]  # (prompt, new tokens) → seconds for each


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=OPENERS)
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    serve(options.kind, options.path, options.threads)


def serve(kind: str, path: Path, threads: int) -> None:
    """Answer each line `PROMPT_LENGTH NEW_TOKENS` on stdin with a line of JSON."""
    # gemma_runtime first: it opts out of telemetry before the peer's library is loaded.
    from gemma_runtime.machine import measure_memory

    started = perf_counter()
    run = OPENERS[kind](path, threads)
    load = perf_counter() - started
    print("figures " + json.dumps({"load": load}), flush=True)
    for line in sys.stdin:
        length, new = map(int, line.split())
        ids = [2, *map(int, np.random.default_rng(1).integers(1000, 200000, length - 1))]
        prefill, decode = run(ids, new)
        memory = measure_memory()
        peak, anonymous = memory.peak_bytes, memory.anonymous_bytes
        answer = {"load": load, "prefill": prefill, "decode": decode, "peak": peak}
        print("figures " + json.dumps({**answer, "anonymous": anonymous}), flush=True)


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
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = _CONTEXT, 1, 0
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
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = _CONTEXT, _BATCH, _BATCH
    parameters.n_threads = parameters.n_threads_batch = threads
    context = llama.llama_init_from_model(model, parameters)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def step(tokens: list[int]) -> int:
        for start in range(0, len(tokens), _BATCH):
            chunk = tokens[start : start + _BATCH]
            array = (llama.llama_token * len(chunk))(*chunk)
            if llama.llama_decode(context, llama.llama_batch_get_one(array, len(chunk))) != 0:
                raise SystemExit(f"error: llama.cpp failed to decode {len(chunk)} tokens")
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


def _open_openvino(path: Path, threads: int) -> Serve:
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # or the second round's prompt costs nothing
    settings = {"scheduler_config": scheduler, "INFERENCE_NUM_THREADS": threads}
    pipeline = genai.LLMPipeline(path, "CPU", **settings)

    def run(prompt: list[int], new: int) -> tuple[float, float]:
        ids = np.array([prompt], np.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        limits = genai.GenerationConfig(max_new_tokens=new + 1, ignore_eos=True, do_sample=False)
        started = perf_counter()
        metrics = pipeline.generate(inputs, limits).perf_metrics
        seconds = perf_counter() - started
        if metrics.get_num_generated_tokens() != new + 1:
            raise SystemExit(f"error: OpenVINO wrote {metrics.get_num_generated_tokens()} tokens")
        prefill = metrics.get_ttft().mean / 1e3
        return prefill, seconds - prefill

    return run


def _open_litert(path: Path, threads: int) -> Serve:
    """Its own benchmark opens the model for each turn, outside of the times, and closes it then."""
    import litert_lm

    def run(prompt: list[int], new: int) -> tuple[float, float]:
        info = litert_lm.Benchmark(
            str(path / "model.litertlm"),
            litert_lm.Backend.CPU(thread_count=threads),
            prefill_tokens=len(prompt),
            decode_tokens=new,
            max_num_tokens=_CONTEXT,
        ).run()
        counts = info.last_prefill_token_count, info.last_decode_token_count
        if counts != (len(prompt), new):
            raise SystemExit(f"error: LiteRT-LM read and wrote {counts} tokens")
        prefill = len(prompt) / info.last_prefill_tokens_per_second
        return prefill, new / info.last_decode_tokens_per_second

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
    "openvino": _open_openvino,
    "litert": _open_litert,
    "optimum": _open_optimum,
    "transformers": _open_transformers,
}


if __name__ == "__main__":
    main()
