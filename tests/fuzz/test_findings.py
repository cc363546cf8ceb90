"""What the fuzzer and a reading of the readers found, by name: each was a traceback or worse."""

import json
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from gemma_export.formats.patterns import matches
from gemma_runtime.errors import GemmaError
from tests.fuzz.bundle_readers import SAMPLE
from tests.fuzz.judge import judge
from tests.fuzz.make_corpus import ADAPTER, CONFIG, QUANTIZED
from tests.fuzz.readers import READERS

_DEEP = "[" * 100_000


def _config(**fields: object) -> str:
    return json.dumps({**CONFIG, **fields})


def _tensor(**fields: object) -> bytes:
    """A file with one tensor of four bytes, whose entry is changed."""
    entry = {"dtype": "U8", "shape": [1, 4], "data_offsets": [0, 4], **fields}
    header = json.dumps({"codes": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


def _zip(**parts: bytes) -> bytes:
    """What holds a teacher, compressed."""
    whole = BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(f"{name}.npy", content)
    return whole.getvalue()


def _array(shape: str) -> bytes:
    """A `.npy` without numbers that claims a shape."""
    header = f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def _pte(at: int, number: int) -> bytes:
    """The linear layer's `.pte` with another number somewhere."""
    (seed,) = READERS["pte"].inputs("pte")
    return seed[:at] + number.to_bytes(4, "little") + seed[at + 4 :]


def _compressed(**fields: object) -> str:
    own = {**QUANTIZED["compressed-tensors"]["quantization_config"], **fields}
    return _config(quantization_config=own)


_ODD_BITS: dict[str, object] = {"a": {"weights": {"num_bits": []}}}
_NO_FLOAT = {**ADAPTER, "lora_alpha": 10**400}
_REFUSED: list[tuple[str, str, str | bytes]] = [
    *((name, "deep nesting", '{"a":' + _DEEP) for name in (
        "config", "config alone", "generation config", "index", "tokenizer", "tokenizer config",
        "adapter config", "benchmark", "manifest", "figures", "safety prompts", "byte grammar",
        "task answers", "mil package", "json schema", "phone schema",
    )),
    ("goldens", "deep nesting", _DEEP),
    ("tools", "deep nesting", _DEEP),
    ("tool results", "deep nesting", _DEEP),
    ("mil package", "entries that are a text",
        '{"itemInfoEntries": "a", "rootModelIdentifier": 9223372036854775808}'),
    ("search", "deep nesting", _DEEP[:20_000]),
    ("search", "a Python object", "checkpoints: !!python/object/apply:os.system ['true']"),
    ("search", "a number of 5000 digits", f"checkpoints: a\ntargets: onnx\ncontext: {'9' * 5000}"),
    ("recipe", "deep nesting", _DEEP[:20_000]),
    ("recipe", "a Python object", "!!python/object/apply:os.system ['true']"),
    ("recipe", "a date that isn't", "name: 2001-99-99"),
    ("recipe", "a number of 5000 digits", "base: " + "9" * 5000),
    ("recipe", "aliases that multiply", "a: &a [x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(20)
    )),
    ("config alone", "a billion layers", _config(num_hidden_layers=10**9)),
    ("config alone", "a size beyond every file", _config(hidden_size=10**30)),
    ("config alone", "a rope beyond every float", _config(rope_theta=10**400)),
    ("generation config", "a temperature beyond every float", f'{{"temperature": {10**400}}}'),
    ("adapter config", "an alpha beyond every float", json.dumps(_NO_FLOAT)),
    ("config", "layer types that are a number", _config(layer_types=3)),
    ("config", "layer types that are lists", _config(layer_types=[[], []])),
    ("config", "a format that is an object", _compressed(format={})),
    ("config", "bits that are a list", _compressed(config_groups=_ODD_BITS)),
    ("index", "a name of 3000 characters", json.dumps({"weight_map": {"a": "x" * 3000}})),
    ("index", "a name with NUL", json.dumps({"weight_map": {"a": "\0.safetensors"}})),
    ("quantize_config", "bytes that are not UTF-8", b'{"bits": "\xff"}'),
    ("manifest", "bytes that are not UTF-8", b'{"schema_version": 2, "a": "\xff"}'),
    ("tokenizer config", "added tokens that are a number", '{"added_tokens_decoder": 5}'),
    ("tokenizer config", "a template's name that is a list", '{"chat_template": [{"name": []}]}'),
    ("added tokens", "a token whose id is a list", '{"<a>": []}'),
    ("added tokens", "an infinite id", '{"<a>": 1e999}'),
    ("added tokens", "an id of a list", '{"<a>": [1]}'),
    ("adapter config", "a pattern that is none", json.dumps({**ADAPTER, "rank_pattern": {"(": 2}})),
    ("safetensors", "sizes that are true", _tensor(shape=[True, 4])),
    ("embedding table", "sizes that are true", _tensor(shape=[True, 4])),
    ("embedding table", "a shape with a line break", _tensor(shape=["a\nb"])),
    ("teacher", "a bomb", _zip(tokens=bytes(1 << 24))),
    ("teacher", "a huge shape", _zip(names=_array("(1000000000000,)"))),
    ("pte", "a root outside of the file", _pte(0, 2**31)),
    ("pte", "a negative offset", _pte(60, 2**31 - 1)),
    ("pte", "nothing", b""),
    ("task results", "a task outside of the folder", json.dumps(
        {"config": {}, "configs": {"x/../../t": {}}}
    )),
    ("task answers", "a likelihood that is an object", json.dumps(
        {**SAMPLE, "resps": [[[{}, "False"]], [["-2", "True"]]]}
    )),
    ("chat template", "an infinite number", "{{ 1e999 }}{{ 1 / 0 }}"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("reader", "content"),
    [(reader, content) for reader, _, content in _REFUSED],
    ids=[f"{reader}: {what}" for reader, what, _ in _REFUSED],
)
def test_what_once_was_a_finding_is_refused(
    tmp_path: Path, reader: str, content: str | bytes
) -> None:
    for package in READERS[reader].packages:
        pytest.importorskip(package)
    data = content if isinstance(content, bytes) else content.encode()
    verdict = judge(READERS[reader].open(tmp_path), data)
    assert verdict.problem is None
    assert not verdict.accepted


def test_an_error_is_one_short_line_of_printable_characters() -> None:
    """Names from files reach the terminal: line breaks, escapes, and 100,000 characters did."""
    message = str(GemmaError(f"tensor a\nb \x1b]0;title\x07 {'x' * 100_000} is bad; copy it again"))
    assert message.isprintable()
    assert len(message) < 2000
    assert message.startswith("tensor a b \\x1b]0;title\\x07 xxx")
    assert message.endswith("x is bad; copy it again")


def test_a_pattern_that_takes_for_ever_is_none() -> None:
    """Python's `re` needs longer than the universe is old for the first."""
    with pytest.raises(ValueError, match="too long"):
        matches("(a|a)*(a|a)*[bc]", "a" * 60)
    assert matches(r"(.*\.)?(layers\.[0-3]\..*_proj)$", "model.layers.2.mlp.up_proj")
