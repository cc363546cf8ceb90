"""LoRA adapters, merged while the base is read. Judged by PEFT's own `merge_and_unload`."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from gemma_export.checkpoint import Checkpoint
from gemma_export.checkpoint.open import open_checkpoint, planned_config
from gemma_export.cli import run
from gemma_export.model.config import TABLE
from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import QuietReporter
from gemma_export.quantize.kept import resolve_recipe
from gemma_export.quantize.recipe import find_recipe
from gemma_runtime.errors import CheckpointError
from gemma_runtime.session import open_session
from tests.export.models import SHORT_GEMMA2, SHORT_GEMMA3, eager_logits, save_tiny, untied

ATTENTION = ["q_proj", "o_proj", "down_proj"]
TOKENS = list(range(1, 40))


@dataclass(frozen=True)
class Base:
    folder: Path

    def train(self, folder: Path, **settings: Any) -> Any:
        """Save an adapter with random matrices; returns the model that has it."""
        model = get_peft_model(self.model(), _lora(**settings))
        torch.manual_seed(len(str(settings)))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "modules_to_save" in name or "magnitude" in name or "tokens_delta" in name:
                    weight.mul_(1 + 0.2 * torch.randn_like(weight))
        model.peft_config["default"].base_model_name_or_path = str(self.folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, about embeddings
            model.save_pretrained(str(folder))
        return model

    def model(self) -> Any:
        kind = SHORT_GEMMA3 if "gemma3" in self.folder.name else SHORT_GEMMA2
        return kind.model.from_pretrained(self.folder, attn_implementation="eager")


def _lora(**settings: Any) -> LoraConfig:
    given = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, **settings}
    return LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **given)


@pytest.fixture(scope="module", params=["gemma2", "gemma3"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp(f"{request.param}-base")
    save_tiny(SHORT_GEMMA3 if request.param == "gemma3" else SHORT_GEMMA2, folder)
    return Base(folder)


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("gemma2-only")
    save_tiny(SHORT_GEMMA2, folder)
    return Base(folder)


def _merged(model: Any) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about tied weights
        merged = model.merge_and_unload()
    return {name: weight.detach() for name, weight in merged.named_parameters()}


def _check_equal(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    for name, shape in checkpoint.config.tensor_shapes().items():
        middle = shape[0] // 3  # two blocks of rows
        parts = [checkpoint.rows(name, 0, middle), checkpoint.rows(name, middle, shape[0])]
        torch.testing.assert_close(torch.cat(parts), expected[name], rtol=1e-6, atol=1e-6)


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "all-linear": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*layers\.1\..*(gate|v)_proj"},
    "ranks and alphas by pattern": {
        "rank_pattern": {"down_proj": 2, "^model.layers.0.self_attn.q_proj": 8},
        "alpha_pattern": {r"layers\.1\.self_attn\.o_proj": 32, "q_proj": 3},
        "use_rslora": True,
    },
    "some layers": {"layers_to_transform": [1]},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "norms replaced": {"modules_to_save": ["input_layernorm", "norm"]},
    "a matrix replaced": {"modules_to_save": ["up_proj"]},
    "trained tokens": {"trainable_token_indices": [3, 90]},
    "trained tokens by module": {"trainable_token_indices": {"model.embed_tokens": [5, 7, 2]}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding with dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["lm_head"]},
    "embedding and head": {"target_modules": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_equal_those_of_peft(base: Base, kind: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about fan_in_fan_out and tied weights
        model = base.train(tmp_path / "style", **KINDS[kind])
    checkpoint = open_checkpoint(str(tmp_path / "style"))
    _check_equal(checkpoint, _merged(model))
    assert checkpoint.id == f"{base.folder.name}+style"


def test_adapters_are_merged_in_order_with_their_weights(base: Base, tmp_path: Path) -> None:
    base.train(tmp_path / "style", use_dora=True)
    base.train(tmp_path / "facts", r=2, target_modules=["q_proj", "up_proj"])
    model: Any = PeftModel.from_pretrained(base.model(), tmp_path / "style", adapter_name="style")
    model.load_adapter(tmp_path / "facts", adapter_name="facts")
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("style", 0.7)
            module.set_scale("facts", -0.5)
    model.base_model.set_adapter(["style", "facts"])
    adapters = (f"{tmp_path}/style=0.7", f"{tmp_path}/facts=-0.5")
    checkpoint = open_checkpoint(str(base.folder), adapters=adapters)
    _check_equal(checkpoint, _merged(model))
    assert checkpoint.id == f"{base.folder.name}+style=0.7+facts=-0.5"


def test_the_digest_covers_adapters_weights_and_order(gemma2: Base, tmp_path: Path) -> None:
    for name in ("a", "b"):
        gemma2.train(tmp_path / name, r=2 if name == "a" else 4)
    a, b = f"{tmp_path}/a", f"{tmp_path}/b"
    given = [(), (a,), (b,), (f"{a}=0.5",), (a, b), (b, a)]
    digests = [open_checkpoint(str(gemma2.folder), adapters=one).digest() for one in given]
    assert len(set(digests)) == len(given)
    assert open_checkpoint(a).digest() == digests[1]


Rename = Callable[[str], str]
NAMES: dict[str, Rename] = {
    "with the adapter's name": lambda n: n.replace("A.weight", "A.default.weight").replace(
        "B.weight", "B.default.weight"
    ),
    "compiled": lambda n: n.replace("base_model.model.", "base_model.model._orig_mod."),
    "sharded": lambda n: n.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "without PEFT's prefix": lambda n: n.removeprefix("base_model.model."),
    "of the inner model": lambda n: n.replace("model.model.model.", "model.model."),
    "multimodal": lambda n: n.replace("model.model.model.", "model.model.model.language_model."),
    "multimodal, older": lambda n: n.replace(
        "model.model.model.", "model.model.language_model.model."
    ),
}


@pytest.mark.parametrize("kind", NAMES)
def test_tensor_names_may_have_other_prefixes(gemma2: Base, kind: str, tmp_path: Path) -> None:
    expected = _merged(gemma2.train(tmp_path))
    _rewrite(tmp_path, lambda tensors: {NAMES[kind](n): t for n, t in tensors.items()})
    _check_equal(open_checkpoint(str(tmp_path)), expected)


def test_vision_tensors_are_left_out_with_a_note(gemma2: Base, tmp_path: Path) -> None:
    expected = _merged(gemma2.train(tmp_path))
    vision = "base_model.model.model.vision_tower.layers.0.q_proj.lora_A.weight"
    _rewrite(tmp_path, lambda tensors: {**tensors, vision: torch.zeros(4, 8)})
    checkpoint = open_checkpoint(str(tmp_path))
    _check_equal(checkpoint, expected)
    assert "without its vision tensors (1)" in " ".join(checkpoint.notes)


def test_half_precision_adapters_are_merged_in_float32(gemma2: Base, tmp_path: Path) -> None:
    gemma2.train(tmp_path)
    _rewrite(tmp_path, lambda tensors: {n: t.bfloat16() for n, t in tensors.items()})
    expected = _merged(PeftModel.from_pretrained(gemma2.model(), tmp_path))
    _check_equal(open_checkpoint(str(tmp_path)), expected)


def test_an_exported_bundle_gives_the_logits_of_the_unmerged_model(
    gemma2: Base, tmp_path: Path
) -> None:
    model = gemma2.train(tmp_path / "style", use_dora=True, target_modules="all-linear")
    request = ExportRequest(
        targets=("onnx",),
        recipe=find_recipe("none"),
        checkpoint=str(tmp_path / "style"),
        context_length=64,
        prefill_length=16,
        output=tmp_path / "bundle",
    )
    (result,) = export_bundles(request, QuietReporter())
    assert result.bundle.manifest.model.id.endswith("+style")
    with open_session(result.bundle, threads=1) as session:
        logits = torch.from_numpy(session.score(TOKENS))
    torch.testing.assert_close(logits, eager_logits(model, TOKENS), rtol=0, atol=1e-4)


def test_the_adapters_own_tokenizer_comes_first(gemma2: Base, tmp_path: Path) -> None:
    gemma2.train(tmp_path / "style")
    own = tmp_path / "base"
    shutil.copytree(gemma2.folder, own)
    (own / "tokenizer.json").write_text("base")
    found = open_checkpoint(str(tmp_path / "style"), base=str(own)).tokenizer()
    assert found is not None
    assert found.tokenizer_json == b"base"
    (tmp_path / "style/tokenizer.json").write_text("style")
    found = open_checkpoint(str(own), adapters=[str(tmp_path / "style")]).tokenizer()
    assert found is not None
    assert found.tokenizer_json == b"style"


def test_generation_values_are_those_of_the_base(gemma2: Base, tmp_path: Path) -> None:
    """PEFT doesn't read the file, so its users get the base's values."""
    gemma2.train(tmp_path)
    before = open_checkpoint(str(tmp_path)).generation
    given = {"eos_token_id": 7, "do_sample": True, "temperature": 0.25, "top_k": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    assert open_checkpoint(str(tmp_path)).generation == before
    loaded: Any = PeftModel.from_pretrained(gemma2.model(), tmp_path)
    assert loaded.generation_config.eos_token_id != 7
    assert loaded.generation_config.top_k != 3


def test_source_keeps_only_what_no_adapter_changes(gemma2: Base, tmp_path: Path) -> None:
    gemma2.train(tmp_path / "style", target_modules=["q_proj"], layers_to_transform=[0])
    resolved = resolve_recipe(find_recipe("source"), open_checkpoint(str(tmp_path / "style")))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert resolved.rounded[name] == "merged with style"
    assert resolved.rounded["model.layers.1.self_attn.q_proj.weight"] == "float32"


def test_a_base_of_another_name_is_told(gemma2: Base, tmp_path: Path) -> None:
    gemma2.train(tmp_path / "style")
    _configure(tmp_path / "style", base_model_name_or_path="google/gemma-2-2b")
    checkpoint = open_checkpoint(str(gemma2.folder), adapters=[str(tmp_path / "style")])
    assert f"style was trained on google/gemma-2-2b; it is merged into {gemma2.folder.name}" in (
        " ".join(checkpoint.notes)
    )


def test_a_folder_with_model_and_adapter_is_its_own_base(gemma2: Base, tmp_path: Path) -> None:
    """As in transformers, which then ignores the base that the adapter's config names."""
    expected = _merged(gemma2.train(tmp_path / "style"))
    for name in ("config.json", "model.safetensors"):
        shutil.copy(gemma2.folder / name, tmp_path / "style")
    _configure(tmp_path / "style", base_model_name_or_path="google/gemma-2-2b")
    (tmp_path / "style/model.safetensors.index.json").write_text(
        json.dumps(
            {
                "weight_map": dict.fromkeys(
                    load_file(gemma2.folder / "model.safetensors"), "model.safetensors"
                )
            }
        )
    )
    _check_equal(open_checkpoint(str(tmp_path / "style")), expected)


def test_a_plan_needs_only_the_adapter_of_an_official_base(tmp_path: Path) -> None:
    adapter = _official(tmp_path, (8, 2304))
    assert planned_config(str(adapter)).hidden_size == 2304
    assert planned_config(None, "2b", adapters=[f"{adapter}=0.5"]).hidden_size == 2304
    with pytest.raises(CheckpointError, match=r"shape \(8, 2304\), expected \(8, 3584\)"):
        planned_config(None, "9b", adapters=[str(adapter)])


def _official(folder: Path, shape: tuple[int, int]) -> Path:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.zeros(shape), name.format("B"): torch.zeros(2048, 8)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8}
    config["base_model_name_or_path"] = "google/gemma-2-2b-it"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
    "no kind": ({"peft_type": None}, "peft_type is None"),
    "biases": ({"bias": "all"}, "bias is 'all', expected 'none'"),
    "trained biases": ({"lora_bias": True}, "lora_bias is True"),
    "changed base": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*changed base"),
    "activated LoRA": ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens is"),
    "copied layers": ({"layer_replication": [[0, 2]]}, "layer_replication is"),
    "rank": ({"r": 5}, r"lora_A.weight has shape \(4, 160\), expected \(5, 160\)"),
    "no rank": ({"r": None}, "r is None for"),
    "broken pattern": ({"rank_pattern": {"(": 3}}, "'\\(' is not a regular expression"),
    "no magnitudes": ({"use_dora": True}, "has no lora_magnitude_vector, but use_dora"),
    "a number as base": ({"base_model_name_or_path": 2}, "or_path is 2, expected a string"),
    "no base": ({"base_model_name_or_path": None}, "names no base model; give it as --base"),
    "lost base": ({"base_model_name_or_path": "/content/it"}, "base /content/it, which does not"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_config_that_cant_be_merged_is_refused(gemma2: Base, kind: str, tmp_path: Path) -> None:
    gemma2.train(tmp_path)
    changes, message = REFUSED[kind]
    _configure(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(str(tmp_path))
    assert "\n" not in str(error.value)


def test_prompt_tuning_is_refused_by_name(gemma2: Base, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(gemma2.model(), config).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="peft_type is 'PROMPT_TUNING'"):
        open_checkpoint(str(gemma2.folder), adapters=[str(tmp_path)])


def test_other_tensors_are_refused(gemma2: Base, tmp_path: Path) -> None:
    gemma2.train(tmp_path)
    stem = "base_model.model.model.layers.0.mlp.down_proj.lora_"
    saved = load_file(tmp_path / "adapter_model.safetensors")

    def check(changed: dict[str, torch.Tensor], message: str) -> None:
        _rewrite(tmp_path, lambda tensors: {**tensors, **changed})
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(str(tmp_path))
        _rewrite(tmp_path, lambda tensors: saved)

    check(
        {"base_model.model.model.layers.9.mlp.down_proj.lora_A.weight": torch.zeros(4, 160)},
        "changes model.layers.9.mlp.down_proj, which the base model doesn't have",
    )
    check({f"{stem}B.weight": torch.zeros(100, 4)}, r"shape \(100, 4\), expected \(128, 4\)")
    check({f"{stem}B.bias": torch.zeros(128)}, "B.bias is a bias")
    check({f"{stem}A.other.weight": torch.zeros(4, 160)}, "two adapters in one file")
    check({f"{stem}A.weight": torch.zeros(4, 160, dtype=torch.int8)}, "is I8, expected one of")
    check(
        {
            f"{stem.replace('model.model.', '')}A.weight": torch.zeros(4, 160),
            f"{stem.replace('model.model.', '')}B.weight": torch.zeros(128, 4),
        },
        r"changes model\.layers\.0\.mlp\.down_proj\.weight twice",
    )
    del saved[f"{stem}B.weight"]
    _rewrite(tmp_path, lambda _: saved)
    check({}, "down_proj has no lora_B")


UNTYING: dict[str, dict[str, Any]] = {
    "embedding replaced": {"modules_to_save": ["embed_tokens"]},
    "head replaced": {"modules_to_save": ["lm_head"]},
    "both replaced": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "head replaced, embedding trained": {
        "modules_to_save": ["lm_head"],
        "target_modules": ["embed_tokens", "q_proj"],
    },
    "embedding replaced, head trained": {
        "modules_to_save": ["embed_tokens"],
        "target_modules": ["lm_head", "q_proj"],
    },
}


@pytest.mark.parametrize("kind", UNTYING)
def test_replaced_values_give_the_model_a_head_of_its_own(
    base: Base, kind: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about tied weights
        model = base.train(tmp_path / "style", **UNTYING[kind])
    checkpoint = open_checkpoint(str(tmp_path / "style"))
    assert not checkpoint.config.tied
    assert "a head apart from its embedding table" in checkpoint.notes[-1]
    assert planned_config(str(tmp_path / "style")) == checkpoint.config
    _check_equal(checkpoint, _merged(model))


def test_an_untied_base_keeps_table_and_head_apart(tmp_path: Path) -> None:
    save_tiny(untied(SHORT_GEMMA2), tmp_path / "base")
    base = Base(tmp_path / "base")
    for name, kind in {**UNTYING, "head": {"target_modules": ["lm_head", "q_proj"]}}.items():
        model = base.train(tmp_path / name, **kind)
        checkpoint = open_checkpoint(str(tmp_path / name))
        assert checkpoint.notes == ()
        _check_equal(checkpoint, _merged(model))


def test_an_adapter_for_one_tensor_does_not_follow_one_that_unties(
    gemma2: Base, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gemma2.train(tmp_path / "a", modules_to_save=["lm_head"])
        gemma2.train(tmp_path / "b", target_modules=["embed_tokens"])
    with pytest.raises(CheckpointError, match="a gives the model a head of its own, and adapter b"):
        open_checkpoint(str(tmp_path / "a"), adapters=[str(tmp_path / "b")])


def test_an_equal_head_and_embedding_are_replaced(gemma2: Base, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gemma2.train(tmp_path, modules_to_save=["embed_tokens", "lm_head"])
    prefix = "base_model.model."
    new = load_file(tmp_path / "adapter_model.safetensors")[f"{prefix}{TABLE}"]
    _rewrite(tmp_path, lambda tensors: {**tensors, f"{prefix}lm_head.weight": new.clone()})
    checkpoint = open_checkpoint(str(tmp_path))
    assert torch.equal(checkpoint.rows(TABLE, 0, len(new)), new)
    with pytest.raises(CheckpointError, match=r"can't have the weight 0\.5"):
        open_checkpoint(str(gemma2.folder), adapters=[f"{tmp_path}=0.5"])


def test_trained_tokens_beyond_the_table_are_refused(gemma2: Base, tmp_path: Path) -> None:
    gemma2.train(tmp_path, trainable_token_indices=[3, 5])
    for tokens in ([3, 96], [3], None, {"lm_head": [3, 5]}):
        _configure(tmp_path, trainable_token_indices=tokens)
        with pytest.raises(
            CheckpointError, match=r"trainable_token_indices is|has shape \(2, 128\)"
        ):
            open_checkpoint(str(tmp_path))


def test_two_adapters_that_replace_the_same_values_are_refused(
    gemma2: Base, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        gemma2.train(tmp_path / name, trainable_token_indices=[3])
    with pytest.raises(CheckpointError, match=r"a and b both change model\.embed_tokens"):
        open_checkpoint(str(tmp_path / "a"), adapters=[str(tmp_path / "b")])


def test_the_plan_of_the_command_line_takes_adapters(
    gemma2: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gemma2.train(tmp_path / "style")
    style, base = str(tmp_path / "style"), str(gemma2.folder)
    flags = [["--checkpoint", base], ["--checkpoint", base, "--adapter", f"{style}=0.5"]]
    flags += [["--checkpoint", style], ["--checkpoint", style, "--base", base, "--adapter", style]]
    plans = []
    for given in flags:
        assert run(["--plan", "--json", *given]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0] == plans[1] == plans[2] == plans[3]


def test_wrong_flags_are_refused(gemma2: Base, tmp_path: Path) -> None:
    gemma2.train(tmp_path / "style")
    style, model = str(tmp_path / "style"), str(gemma2.folder)
    with pytest.raises(CheckpointError, match=r"--base .* needs an adapter as --checkpoint"):
        open_checkpoint(model, base=model)
    with pytest.raises(CheckpointError, match="is not an adapter; expected a folder"):
        open_checkpoint(model, adapters=[model])
    with pytest.raises(CheckpointError, match="weight 'half' is not a number"):
        open_checkpoint(model, adapters=[f"{style}=half"])
    with pytest.raises(CheckpointError, match="is an adapter too"):
        open_checkpoint(style, base=style)


def test_pickles_and_missing_weights_are_refused(gemma2: Base, tmp_path: Path) -> None:
    gemma2.train(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"adapter_model.bin is a pickle"):
        open_checkpoint(str(tmp_path))


def _configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _rewrite(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
