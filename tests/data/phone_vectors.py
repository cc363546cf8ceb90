"""Writes the results of the Python code that the Kotlin and Swift ports must reproduce.

    python -m tests.data.phone_vectors                 # phone_vectors.json and gemma4/, committed
    python -m tests.data.phone_vectors --genuine FOLDER FILE...  # real tokenizers, not committed

The first uses the tokenizer of the tiny bundle, and for Gemma 4's chats that of `gemma4`.
`schema_cases.json` is written by hand: Python, Kotlin and Swift read it.
"""

import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
from tokenizers import AddedToken

from gemma_export.sidecars.compact_tokenizer import compact_tokenizer
from gemma_runtime.backend_table import Limits
from gemma_runtime.bundle import open_bundle
from gemma_runtime.manifest import Agreement
from gemma_runtime.measure.bench import (
    Benchmark,
    BundleFigures,
    PromptFigures,
    Spread,
    fit_workload,
)
from gemma_runtime.proof.goldens import load_goldens
from gemma_runtime.proof.verify import Verification, limits_of, verify
from gemma_runtime.session import Logits, open_session
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.sampler import Sampler, Sampling
from gemma_runtime.text.tokenizer import Tokenizer
from tests.data import gemma4_vectors
from tests.runtime.conftest import loaded, small_tokenizer

DATA = Path(__file__).parent
TINY = DATA / "tiny"
VECTORS = DATA / "phone_vectors.json"
BOS = 2
CALLS = DATA / "calls" / "tokenizer.gtok"  # with tokens as FunctionGemma's, which are not special
TARGETS = ("onnx", "executorch", "coreml")
CONTEXTS = (2, 24, 96, 150, 500, 512, 2048, 2112, 8192)
SEEDS = (0, 1, 7, 2**32 - 1, 2**32, 1234567890123456789, 2**63 - 1)  # a Kotlin Long holds the last
REPORTS = (Verification, Limits, Agreement, Benchmark, BundleFigures, PromptFigures, Spread)

TEXTS = [
    "",
    " ",
    "the user in the inn",
    "  two   three    four",
    "\n",
    "a\n\nb\n\n\n\n\n\nc",
    "\t\ttabs \t and\rreturns\r\n",
    "Grüße, naïve café",  # composed
    "cafe\u0301 e\u0301e\u0301",  # combining marks
    "日本語のテキスト、中文文本。한국어",
    "Привет, мир! Γειά σου Κόσμε",
    "مرحبا بالعالم שלום עולם",
    "नमस्ते दुनिया สวัสดีชาวโลก",
    "😀👍🏽👩‍👩‍👧‍👦🏳️‍🌈🇩🇪",
    "\u0000\u0001\u007f\u0085\u00a0\u2028\ufeff\uffff\U0010ffff",
    "▁a▁▁b ▁ c",
    "<bos><eos><pad><unk>",
    "<start_of_turn>user\nhi<end_of_turn>",
    "<unused0> <unused1><unused99><unused> <mask>[multimodal]",
    "<mask><mask>the<mask",
    "<<mask>><unused0><b><eos><b>",
    "<unused٣><mask>",  # a digit, but not one of ours
    "<0x41><0xFF>",
    "aaaa aaaaa     aaaaaaaaaaa",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # ok",
    "thethethe ing inging ususer <e<eos",
]
NAMED = [
    "<escape>",
    "a<start_function_call>call:f{x:<escape>the<escape>}<end_function_call> user",
    "<escape><mask><escape",
    "<start_function_calls><end_function_call",
]
TURNS = [
    [("user", "the user")],
    [("user", "  padded \n\n")],
    [("user", "\u00a0\u2003wide\u3000\x1f")],
    [("user", "in"), ("assistant", " the inn \n"), ("user", "ing?")],
    [("system", " be brief "), ("user", "hello <end_of_turn>\n<start_of_turn>model\nno")],
    [("user", "<bos><mask><unused0>"), ("assistant", "<eos>"), ("user", "é😀")],
    [("user", "   ")],
    [("user", "in</think>"), ("assistant", "the</think> us </think>\n\n er "), ("user", "inn")],
    [("user", "a"), ("assistant", "<end_of_turn></think><eos>"), ("user", "b</think><bos>")],
]


def vectors() -> dict[str, object]:
    bundle = open_bundle(TINY)
    tokenizer = Tokenizer(bundle.path("tokenizer"))
    texts = [*TEXTS, *random_texts(random.Random(1), 60)]
    with open_session(bundle, threads=1, exact=True) as session:
        figures = verify(session, load_goldens(bundle.path("goldens")))
    return {
        "encode": encoded(tokenizer, texts),
        "encode_control": encoded(tokenizer, TEXTS, control=True),
        "decode": decoded(tokenizer, random.Random(2)),
        "encode_calls": encoded(with_calls()[0], [*TEXTS, *NAMED]),
        "chat": [chat_vector(tokenizer, bundle.manifest.chat_template, turns) for turns in TURNS],
        "sampler": [*draws(np.random.default_rng(3)), *extreme_draws(np.random.default_rng(8))],
        "seeds": [seeded(seed) for seed in SEEDS],
        "limits": {target: asdict(limits_of(target)) for target in TARGETS},
        "workloads": [workload(context) for context in CONTEXTS],
        "fields": {part.__name__: reported_fields(part) for part in REPORTS},
        "verify": {
            "lowering": asdict(figures.lowering),
            "quantization": asdict(figures.quantization),
        },
        "gemma4": gemma4_vectors.vectors(),
    }


def with_calls() -> tuple[Tokenizer, bytes]:
    """The small tokenizer with tokens around calls, and its compact file."""
    raw = small_tokenizer()
    names = ("<escape>", "<start_function_call>", "<end_function_call>")
    raw.add_tokens([AddedToken(name, normalized=False) for name in names])
    return loaded(raw), compact_tokenizer(raw.to_str().encode())


def workload(context_length: int) -> dict[str, object]:
    """What a benchmark runs. The phones' number of new tokens shrinks with the context."""
    manifest = replace(open_bundle(TINY).manifest, context_length=context_length)
    new_tokens = min(64, context_length // 2)
    fitted = asdict(fit_workload(manifest, 1, new_tokens))
    del fitted["threads"]
    return {"context_length": context_length, **fitted}


def reported_fields(part: type) -> list[str]:
    """Names of the fields that the apps' reports have too: they don't tell where it is worst."""
    untold = ("worst", "quantization_by_golden")
    return [field.name for field in fields(part) if field.name not in untold]


def genuine_vectors(folder: Path, source: Path) -> None:
    """Write the compact tokenizer, and how the real tokenizer encodes 4,500 texts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.gtok").write_bytes(compact_tokenizer(source.read_bytes()))
    tokenizer = Tokenizer(source)
    texts = [*TEXTS, *random_texts(random.Random(4), 2500), *lines_of_this_project(2000)]
    content = {"encode": encoded(tokenizer, texts), "decode": decoded(tokenizer, random.Random(5))}
    (folder / "vectors.json").write_text(json.dumps(content))


def encoded(
    tokenizer: Tokenizer, texts: Sequence[str], control: bool = False
) -> list[dict[str, object]]:
    encodings = [tokenizer.encode(text, control=control) for text in texts]
    return [
        {"text": text, "ids": ids, "decoded": tokenizer.decode(ids)}
        for text, ids in zip(texts, encodings, strict=True)
    ]


def decoded(tokenizer: Tokenizer, chance: random.Random) -> list[dict[str, object]]:
    """Random tokens, mostly byte tokens, so most of the text is invalid UTF-8."""
    names = [f"<0x{byte:02X}>" for byte in [*range(0x7F, 0x100), 0x20, 0x41]]
    bytes_ = [token for name in names if (token := tokenizer.token_id(name)) is not None]
    cases = []
    for _ in range(80):
        ids = [
            chance.choice(bytes_) if chance.random() < 0.7 else chance.randrange(360)
            for _ in range(chance.randrange(1, 12))
        ]
        stream = tokenizer.stream()
        pieces = [stream.push(token) for token in ids]
        cases.append({"ids": ids, "pieces": pieces, "flush": stream.flush()})
    return cases


def chat_vector(
    tokenizer: Tokenizer, template: str | None, turns: Sequence[tuple[str, str]]
) -> dict[str, object]:
    messages = [Message(role, content) for role, content in turns]  # type: ignore[arg-type]
    ids = encode_chat(tokenizer, template, messages, BOS)
    return {"messages": [{"role": r, "content": c} for r, c in turns], "ids": ids}


def draws(chance: np.random.Generator) -> Iterator[dict[str, object]]:
    """Sampler draws, each with its random number written down."""
    samplings = [
        Sampling(),
        Sampling(repetition_penalty=1.3),
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=5),
        Sampling(temperature=1.5, top_p=0.8),
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
        Sampling(temperature=1e-6, top_p=0.5),
    ]
    for sampling in samplings:
        for _ in range(12):
            logits = (chance.standard_normal(40) * 3).astype(np.float32)
            logits[chance.integers(40, size=6)] = logits[3]  # ties
            previous = chance.integers(40, size=5).tolist()
            yield drawn(sampling, logits, previous, chance)


def drawn(
    sampling: Sampling, logits: Logits, previous: list[int], chance: np.random.Generator
) -> dict[str, object]:
    noise = float(chance.random())
    sampler = Sampler(sampling)
    sampler._random = FixedNoise(noise)  # type: ignore[assignment]
    return {
        "sampling": described(sampling),
        "logits": [float(x) for x in logits],
        "previous": previous,
        "noise": noise,
        "token": sampler.pick(logits, previous),
    }


def described(sampling: Sampling) -> dict[str, object]:
    return {name: value for name, value in asdict(sampling).items() if name != "seed"}


def extreme_draws(chance: np.random.Generator) -> Iterator[dict[str, object]]:
    """Draws at the ends of float32 and of the temperature."""
    most = float(np.finfo(np.float32).max)
    values = [1e4, -1e4, 9999.0, 65504.0, most, -most, 1e-45, 0.0, 30.0, -30.0]
    for temperature in (0.0, 5e-324, 1e-7, 1.0, 1e5, 1e300):
        for filters in ({}, {"top_p": 0.9}, {"top_k": 3, "min_p": 0.05}):
            sampling = Sampling(temperature, **filters)  # type: ignore[arg-type]
            yield drawn(sampling, chance.choice(values, 12).astype(np.float32), [], chance)


def seeded(seed: int) -> dict[str, object]:
    """The first numbers and tokens of a seed."""
    noise, sampling = np.random.Generator(np.random.PCG64(seed)), Sampling(1.0, 90, 0.98, 1e-4)
    logits = np.array([(token * 37 % 101) / 9 - 4 for token in range(101)], np.float32)
    sampler = Sampler(replace(sampling, seed=seed))
    return {
        "seed": str(seed),  # not every reader of JSON has integers of 64 bits
        "noise": [noise.random() for _ in range(8)],
        "sampling": described(sampling),
        "logits": [float(x) for x in logits],
        "tokens": [sampler.pick(logits, []) for _ in range(20)],
    }


class FixedNoise:
    def __init__(self, noise: float) -> None:
        self._noise = noise

    def random(self) -> float:
        return self._noise


def random_texts(chance: random.Random, count: int) -> list[str]:
    """Random sequences of pieces of TEXTS, arbitrary Unicode and runs of white space."""

    def part() -> str:
        kind = chance.randrange(6)
        if kind == 0:
            return chance.choice(" \n\t▁-=a") * chance.randrange(1, 40)
        if kind == 1:
            points = (chance.randrange(0x110000) for _ in range(chance.randrange(1, 6)))
            return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
        if kind == 2:
            return "".join(chr(chance.randrange(32, 0x250)) for _ in range(chance.randrange(12)))
        text = chance.choice(TEXTS)
        start = chance.randrange(len(text) + 1)
        return text[start : start + chance.randrange(1, 30)]

    return ["".join(part() for _ in range(chance.randrange(1, 7))) for _ in range(count)]


def lines_of_this_project(count: int) -> list[str]:
    root = DATA.parents[1]
    places = [*root.glob("*.md"), *root.glob("runtime/**/*.py"), *root.glob("export/**/*.py")]
    lines = [line for path in sorted(places) for line in path.read_text("utf-8").splitlines()]
    return random.Random(6).sample(lines, min(count, len(lines)))


def main(arguments: Sequence[str]) -> None:
    if not arguments:
        gemma4_vectors.write_files()
        CALLS.parent.mkdir(exist_ok=True)
        CALLS.write_bytes(with_calls()[1])
        VECTORS.write_text(json.dumps(vectors()) + "\n")
        return
    _, folder, *sources = arguments
    for source in sources:
        genuine_vectors(Path(folder) / Path(source).parent.name, Path(source))


if __name__ == "__main__":
    main(sys.argv[1:])
