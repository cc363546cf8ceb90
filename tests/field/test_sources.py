"""Every row of the page "What can be exported" has a test that proves it."""

from collections.abc import Callable, Iterable, Mapping

import pytest

from gemma_export.checkpoint import sources
from gemma_export.checkpoint.adapter_folder import MERGED
from gemma_export.checkpoint.open import ADDRESSES
from gemma_export.checkpoint.packed_folder import BESIDE, READERS
from gemma_export.checkpoint.text_names import NAMES
from gemma_export.checkpoint.weight_files import LAYOUTS
from gemma_runtime.formats.gguf import OTHER_TYPES, GgufType
from tests.export.checkpoint import (
    test_folder,
    test_gguf,
    test_gguf_tokenizer,
    test_hub,
    test_prequantized,
)
from tests.export.embedding import test_encoder_folders
from tests.export.model import test_config
from tests.field import (
    test_added_tokens,
    test_chat_template_places,
    test_compressed_tensors,
    test_config_corners,
    test_float8,
    test_gguf_kinds,
    test_gptq_awq,
    test_lora_adapters,
    test_mixed_kinds,
    test_mlx,
    test_not_a_checkpoint,
    test_other_models,
    test_stale_weights,
    test_tensor_names,
    test_tokenizer_model_alone,
)

Proofs = Mapping[str, Callable[..., None]]  # beginning of a row → its test

_MIX = test_mixed_kinds.test_any_mix_is_read_as_the_plain_folder_is
_PLACES = test_chat_template_places.test_chats_are_rendered_as_transformers_renders_them
_LATE_PLACES = test_chat_template_places.test_the_processor_s_places_come_last
_ADDED = test_added_tokens.test_ids_are_those_of_transformers
_ENCODER = test_encoder_folders.test_what_is_no_embedding_gemma_is_refused_by_name
_PEFT = test_lora_adapters.test_weights_equal_those_of_peft
_ADAPTER = test_lora_adapters.test_a_config_that_cant_be_merged_is_refused
_GGUF = test_gguf_kinds.test_every_block_type_of_the_gguf_package_is_dequantized

ADDRESS: Proofs = {
    "`FOLDER`": test_not_a_checkpoint.test_a_folder_with_one_gguf_file_is_that_file,
    "`FILE.gguf`": test_gguf_kinds.test_a_split_model_is_read_as_one_whichever_part_is_given,
    "`~/.ollama": test_gguf_kinds.test_an_ollama_blob_is_read_with_its_own_keys,
    "`OWNER/NAME`": test_hub.test_a_revision_of_a_checkpoint_is_fetched,
    "`https:": test_hub.test_the_page_of_a_model_is_read_as_its_id_and_revision,
    "`OWNER/NAME:": test_gguf_kinds.test_a_pattern_chooses_one_model_of_a_repository,
    "`random": test_folder.test_random_rows_are_the_same_in_one_read_or_several,
    "`demo`": test_gguf.test_the_demo_is_gemma_3_270m,
}
LAYOUT: Proofs = {
    "`transformers_weights`": test_stale_weights.test_the_file_that_the_config_names_is_read,
    "`model.safetensors`": _MIX,
    "`model.safetensors.index.json`": _MIX,
    "other safetensors": test_stale_weights.test_shards_without_their_index_are_read,
}
NAME: Proofs = {
    "names that begin": test_tensor_names.test_names_with_another_beginning_or_none_are_read,
    "names with any other": _MIX,
    "`lm_head": test_tensor_names.test_a_head_that_differs_is_its_own_although_the_config_ties_it,
    "towers for images": test_tensor_names.test_extra_heads_are_left_out_with_a_note,
}
PACKED: Proofs = {
    "gptq": test_gptq_awq.test_overrides_and_exclusions_of_gptqmodel_are_followed,
    "awq": test_gptq_awq.test_awq_with_its_older_keys_in_config_json_is_read,
    "auto-round": test_gptq_awq.test_the_packings_of_auto_round_are_read,
    "compressed-tensors": test_compressed_tensors.test_codes_are_kept_and_logits_are_those_of_transformers,  # noqa: E501
    "bitsandbytes": test_prequantized.test_bitsandbytes_is_rounded_again_with_a_note,
    "fp8": test_float8.test_values_are_those_of_transformers,
    "fbgemm_fp8": test_float8.test_values_are_those_of_transformers,
    "mlx": test_mlx.test_codes_with_whole_zero_points_are_kept_exactly,
    "quantize_config.json": test_gptq_awq.test_a_config_beside_the_weights_is_used,
    "quant_config.json": test_gptq_awq.test_awq_with_its_older_keys_in_a_file_of_its_own_is_read,
}
TYPE: Proofs = {
    "Q4_0": test_prequantized.test_kept_ggml_codes_give_exactly_the_same_weights,
    "Q8_0": test_prequantized.test_kept_ggml_codes_give_exactly_the_same_weights,
    "Q5_0": test_prequantized.test_kept_ggml_codes_give_exactly_the_same_weights,
    "Q6_K": test_prequantized.test_q6_k_keeps_its_codes_and_a_note_says_that_scales_are_rounded,
    "F32": test_gguf.test_a_float_file_has_no_notes,
    "Q4_1": _GGUF,
    "Q8_1": test_gguf_kinds.test_a_type_with_scales_outside_of_its_blocks_is_refused_by_name,
}
ADAPTER: Proofs = {
    "LoRA, rsLoRA, DoRA": _PEFT,
    "`modules_to_save`, ": _PEFT,
    "LoRA on": _PEFT,
    "`modules_to_save` with": test_lora_adapters.test_replaced_values_give_the_model_a_head_of_its_own,  # noqa: E501
    "tensors of the vision": test_lora_adapters.test_vision_tensors_are_left_out_with_a_note,
    "`generation_config": test_lora_adapters.test_generation_values_are_those_of_the_base,
    "trained on": test_lora_adapters.test_a_base_of_another_name_is_told,
}
TOKENIZER: Proofs = {
    "`tokenizer.json`": test_tokenizer_model_alone.test_a_tokenizer_json_is_preferred,
    "`tokenizer.model`": test_tokenizer_model_alone.test_thousands_of_texts_have_the_ids_of_transformers,  # noqa: E501
    "`tokenizer.ggml": test_gguf_tokenizer.test_any_string_has_the_original_ids,
}
ADDED: Proofs = {
    "`added_tokens_decoder`": _ADDED,
    "without it": _ADDED,
    "`tokenizer_config": _ADDED,
}
TEMPLATE: Proofs = {
    "`chat_template.jinja`": _PLACES,
    "`tokenizer_config.json`": _PLACES,
    "`processor_config.json`": _LATE_PLACES,
    "`chat_template.json`": _LATE_PLACES,
    "`tokenizer.chat_template`": test_gguf_tokenizer.test_the_chat_template_is_read_from_the_file,
}
REFUSED: Proofs = {
    "classifiers": test_other_models.test_a_model_that_is_not_causal_is_refused_by_name,
    "`bidirectional`": test_other_models.test_a_model_that_is_not_causal_is_refused_by_name,
    "a Gemma inside": test_other_models.test_a_text_model_inside_another_model_is_refused_by_the_outer_name,  # noqa: E501
    "`auto_map`": test_other_models.test_a_model_that_is_not_causal_is_refused_by_name,
    "other families": test_config.test_the_error_for_a_wrong_config_names_the_field,
    "ropes": test_config_corners.test_ropes_that_we_do_not_compute_are_refused,
    "`attention_bias`": test_config.test_the_error_for_a_wrong_config_names_the_field,
    "mixtures of experts": test_config.test_a_mixture_of_experts_is_refused,
    "pickles": test_folder.test_pickles_and_quantized_weights_are_refused,
    "Git LFS": test_not_a_checkpoint.test_a_git_lfs_pointer_is_named_with_what_to_run,
    "an encoder's folder": _ENCODER,
    "an encoder's `tokenizer": _ENCODER,
    "pooling": _ENCODER,
    "a tensor in two": test_stale_weights.test_a_tensor_in_two_files_is_refused_by_both_names,
    "an index that": test_folder.test_an_index_that_points_outside_the_folder_is_refused,
    "`tie_word_embeddings: false`": test_tensor_names.test_an_untied_model_without_its_head_or_its_table_is_refused,  # noqa: E501
    "two text models": test_tensor_names.test_two_text_models_are_refused_by_their_names,
    "tensors of an adapter": test_tensor_names.test_adapters_inside_a_model_are_refused_by_name,
    "packed tensors": test_tensor_names.test_packed_weights_without_their_config_are_refused,
    "adapters of another": test_lora_adapters.test_prompt_tuning_is_refused_by_name,
    "adapters with `alora": _ADAPTER,
    "adapters that started": _ADAPTER,
    "adapters with trained": _ADAPTER,
    "an adapter for one": test_lora_adapters.test_an_adapter_for_one_tensor_does_not_follow_one_that_unties,  # noqa: E501
    "GGUF models": test_gguf_kinds.test_a_missing_part_is_named,
    "GGUF vocabularies": test_gguf_tokenizer.test_an_incomplete_vocabulary_is_refused,
    "a `quant_method`": test_gptq_awq.test_other_layouts_and_methods_are_refused_by_name,
}
TABLES: Mapping[str, tuple[Iterable[str], Proofs]] = {
    "addresses": (ADDRESSES, ADDRESS),
    "layouts": (LAYOUTS, LAYOUT),
    "names": (NAMES, NAME),
    "packed": ([*READERS, *BESIDE], PACKED),
    "gguf types": ([name for name, _ in sources.gguf_types()], TYPE),
    "adapters": (MERGED, ADAPTER),
    "tokenizers": ([name for name, _ in sources.tokenizers()], TOKENIZER),
    "added tokens": ([name for name, _ in sources.added_tokens()], ADDED),
    "templates": ([name for name, _ in sources.templates()], TEMPLATE),
    "refused": ([name for name, _ in sources.refused()], REFUSED),
}


@pytest.mark.parametrize("table", TABLES)
def test_every_row_has_a_test_and_every_test_a_row(table: str) -> None:
    """A new reader needs a test of its own before the page may show it."""
    rows, proofs = TABLES[table]
    unproved = {row for row in rows if not any(row.startswith(begin) for begin in proofs)}
    gone = {begin for begin in proofs if not any(row.startswith(begin) for row in rows)}
    assert (unproved, gone) == (set(), set())


def test_every_block_type_of_gguf_is_in_one_row() -> None:
    names = [name for row, _ in sources.gguf_types() for name in row.split(", ")]
    assert sorted(names) == sorted([kind.name for kind in GgufType] + [*OTHER_TYPES.values()])
