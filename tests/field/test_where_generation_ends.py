"""Stop tokens and sampling values, whichever file of the checkpoint names them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, GenerationConfig

from gemma_export.checkpoint.folder import open_folder
from gemma_export.checkpoint.generation import generation_from_gguf, generation_from_hf
from gemma_export.formats.gguf_file import read_header
from gemma_export.progress import QuietReporter
from gemma_export.sidecars.stop_tokens import find_stop_tokens
from gemma_export.sidecars.text import WantedText, read_text
from gemma_runtime.errors import ConfigError
from gemma_runtime.manifest import SamplingDefaults
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.tokenizer import Tokenizer
from tests.export.conftest import Notes, export_folder
from tests.runtime.conftest import small_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EOS, END_OF_TURN = 1, 5
END = small_tokenizer().get_vocab_size() + 1  # <|im_end|>


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 2 of one layer whose vocabulary has a ChatML fine-tune's tokens."""
    folder = tmp_path_factory.mktemp("weights")
    config = Gemma2Config(
        vocab_size=_chatml_tokenizer().get_vocab_size(),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=64,
        eos_token_id=EOS,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    return folder


def _chatml_tokenizer(special: bool = True) -> Any:
    raw = small_tokenizer()
    added = [AddedToken(piece, special=special) for piece in ("<|im_start|>", "<|im_end|>")]
    (raw.add_special_tokens if special else raw.add_tokens)(added)
    return raw


def make(
    weights: Path,
    folder: Path,
    files: Mapping[str, Mapping[str, object]],
    *,
    template: str | None = None,
    special: bool = True,
) -> Path:
    """A checkpoint folder with these files beside the weights."""
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(weights / name)
    _chatml_tokenizer(special).save(str(folder / "tokenizer.json"))
    own = {"bos_token": "<bos>", "tokenizer_class": "PreTrainedTokenizerFast"}
    for name, content in {"tokenizer_config.json": {}, **files}.items():
        base = own if name == "tokenizer_config.json" else {}
        (folder / name).write_text(json.dumps({**base, **content}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def stops(folder: Path, reporter: QuietReporter | None = None) -> tuple[str | int | None, ...]:
    checkpoint = open_folder(folder)
    files = checkpoint.tokenizer()
    raw = _chatml_tokenizer()
    found = find_stop_tokens(checkpoint, files, raw, reporter or QuietReporter())
    return tuple(raw.id_to_token(token) for token in found)


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"generation_config.json": {"eos_token_id": END}}, "{{ messages[0].content }}"),
        ({"generation_config.json": {"eos_token_id": [1, END]}}, None),
        ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, None),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}}}, None),
        ({"special_tokens_map.json": {"eos_token": "<|im_end|>"}}, None),
        ({"special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}}}, None),
        ({}, CHATML),
        ({}, CHATML.replace("'<|im_end|>\n'", "'<|im_end|>' + '\n' * (not loop.last)")),
        ({}, CHATML.replace("'<|im_end|>\n'", "' \n<|im_end|>\n'")),
        ({}, CHATML.replace("messages %}", "messages %}{% if m.role == 'system' %}X{% endif %}")),
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_the_end_of_a_chatml_reply_is_found_in_every_file_that_can_name_it(
    weights: Path,
    tmp_path: Path,
    files: dict[str, dict[str, object]],
    template: str | None,
    special: bool,
) -> None:
    """A ChatML fine-tune never stopped: only config.json and `<end_of_turn>` were read."""
    folder = make(weights, tmp_path / "model", files, template=template, special=special)
    assert set(stops(folder)) == {"<eos>", "<end_of_turn>", "<|im_end|>"}


def test_white_space_and_tags_after_a_reply_do_not_end_it(weights: Path, tmp_path: Path) -> None:
    """Gemma's vocabulary has runs of line breaks and HTML tags as added tokens."""
    template = "{% for m in messages %}{{ m.content }}\n\n### <b>{{ m.role }}</b>{% endfor %}"
    assert stops(make(weights, tmp_path / "model", {}, template=template)) == (
        "<eos>",
        "<end_of_turn>",
    )


def test_a_stop_token_outside_the_vocabulary_is_left_out_with_a_note(
    weights: Path, tmp_path: Path
) -> None:
    notes = Notes()
    generation = {"generation_config.json": {"eos_token_id": [1, 99_999, -1]}}
    assert stops(make(weights, tmp_path / "model", generation), notes) == ("<eos>", "<end_of_turn>")
    assert [note.partition(":")[0] for note in notes.texts] == [
        "stop token 99999 is left out",
        "stop token -1 is left out",
    ]


def test_a_config_without_stop_token_leaves_them_to_the_other_files(
    weights: Path, tmp_path: Path
) -> None:
    folder = make(weights, tmp_path / "model", {"tokenizer_config.json": {"eos_token": "<eos>"}})
    config = json.loads((weights / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    assert stops(folder) == ("<eos>", "<end_of_turn>")


def test_a_bundle_has_the_stop_tokens_sampling_and_ids_of_transformers(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bos was put before a template that writes none, and `eos_token` was always `<eos>`."""
    template = CHATML.replace("'<|im_end|>\n'", "eos_token + '\n'")
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "eos_token_id": [END]}
    names = {"eos_token": "<|im_end|>", "chat_template": template}
    files: dict[str, dict[str, object]] = {
        "generation_config.json": sampling,
        "tokenizer_config.json": {**names},
    }
    folder = make(weights, tmp_path / "model", files)
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path / "cache"))
    bundle = export_folder(folder, "int8", tmp_path / "bundle", context=64)
    manifest = bundle.manifest
    assert set(manifest.stop_tokens) == {EOS, END_OF_TURN, END}
    assert manifest.sampling == SamplingDefaults(0.7, 50, 0.9, 0.0, 1.0)
    turns = [("user", "the"), ("assistant", "us"), ("user", "in")]
    ids = encode_chat(
        Tokenizer(bundle.path("tokenizer")),
        manifest.chat_template,
        [Message(role, content) for role, content in turns],  # type: ignore[arg-type]
        manifest.bos_token,
        manifest.eos_token,
    )
    reference = AutoTokenizer.from_pretrained(folder)
    assert ids == reference.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        add_generation_prompt=True,
        return_dict=False,
    )


def test_truncation_and_padding_saved_by_a_trainer_are_switched_off(
    weights: Path, tmp_path: Path
) -> None:
    """Goldens were full of `<pad>`, and calibration read a quarter of its tokens."""
    clean = make(weights, tmp_path / "clean", {})
    trained = make(weights, tmp_path / "trained", {})
    raw = _chatml_tokenizer()
    raw.enable_truncation(max_length=4)
    raw.enable_padding(length=8, pad_token="<pad>")
    raw.save(str(trained / "tokenizer.json"))
    texts = [
        read_text(open_folder(folder), 64, [], WantedText(), QuietReporter())
        for folder in (clean, trained)
    ]
    assert texts[0].prompts == texts[1].prompts
    stored = [json.loads(text.files.tokenizer_json) for text in texts if text.files]
    assert stored[0] == stored[1]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"eos_token_id": 1}, None),
        ({"do_sample": False, "temperature": 0.7}, SamplingDefaults(0.0, 0, 1.0, 0.0, 1.0)),
        ({"do_sample": True}, SamplingDefaults(1.0, 50, 1.0, 0.0, 1.0)),
        (
            {"do_sample": True, "top_k": 64, "top_p": 0.95},
            SamplingDefaults(1.0, 64, 0.95, 0.0, 1.0),
        ),
        ({"temperature": 0.7, "top_k": None}, SamplingDefaults(0.7, 50, 1.0, 0.0, 1.0)),
        ({"do_sample": True, "top_k": -1}, SamplingDefaults(1.0, 0, 1.0, 0.0, 1.0)),
        ({"repetition_penalty": 1.2}, SamplingDefaults(0.0, 0, 1.0, 0.0, 1.2)),
        ({"do_sample": True, "min_p": 0.1}, SamplingDefaults(1.0, 50, 1.0, 0.1, 1.0)),
    ],
)
def test_sampling_values_are_those_of_generation_config(
    fields: dict[str, object], expected: SamplingDefaults | None
) -> None:
    assert generation_from_hf(fields).sampling == expected


def test_top_k_without_a_value_is_that_of_transformers() -> None:
    sampling = generation_from_hf({"do_sample": True}).sampling
    assert sampling is not None
    assert sampling.top_k == GenerationConfig._get_default_generation_params()["top_k"]


def test_a_gguf_bundle_has_the_sampling_values_and_every_stop_token(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp, which reads them there, neither sampled so nor stopped."""
    files = {"generation_config.json": {"do_sample": True, "top_k": 64, "eos_token_id": [1, END]}}
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path / "cache"))
    folder = make(weights, tmp_path / "model", files)
    bundle = export_folder(folder, "int8", tmp_path / "bundle", context=64, target="gguf")
    written = read_header(bundle.directory / "model.gguf").metadata
    assert generation_from_gguf(written).sampling == bundle.manifest.sampling
    names = ("eos", "eot", "eom")
    ends = {written[f"tokenizer.ggml.{name}_token_id"] for name in names}
    assert ends == set(bundle.manifest.stop_tokens) == {EOS, END_OF_TURN, END}


def test_sampling_values_of_a_gguf_file_are_those_that_llama_cpp_reads() -> None:
    metadata = {"general.sampling.temp": 0.8, "general.sampling.top_p": 0.949999988079071}
    expected = SamplingDefaults(0.8, 0, 0.95, 0.0, 1.0)
    assert generation_from_gguf(metadata).sampling == expected
    assert generation_from_gguf({"general.name": "x"}).sampling is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eos_token_id": "<eos>"}, "eos_token_id is '<eos>', expected a token id or a list"),
        ({"do_sample": True, "top_p": 2}, "top_p is 2, expected a number from 0 to 1"),
        ({"do_sample": True, "temperature": "hot"}, "temperature is 'hot', expected a number"),
        ({"do_sample": True, "top_k": 1.5}, "top_k is 1.5, expected a whole number"),
    ],
)
def test_a_wrong_value_is_refused_by_its_file_and_name(
    weights: Path, tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    folder = make(weights, tmp_path / "model", {"generation_config.json": fields})
    with pytest.raises(ConfigError, match=f"generation_config.json: {message}"):
        open_folder(folder)
