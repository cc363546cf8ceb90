"""The torch decoder gives the logits of transformers with eager attention."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from gemma_export.checkpoint import SourceWeight
from gemma_export.model.config import GemmaConfig
from gemma_export.model.decoder import decoder
from gemma_export.model.ops import Weight
from gemma_export.model.torch_ops import TorchOps, visible
from gemma_runtime.manifest import AttentionKind, Rope
from tests.export.conftest import TinyCheckpoint, only
from tests.export.models import GEMMA4S, TINIES, UNNORMED, WINDOW, eager_logits

TOKENS = np.random.default_rng(1).integers(0, 96, 100).tolist()  # six windows


def reference(tiny: TinyCheckpoint, tokens: list[int], config: GemmaConfig) -> torch.Tensor:
    checkpoint, shapes = tiny.open(), config.tensor_shapes()
    ops = TorchOps(torch.tensor([tokens]), config.rms_norm_eps)
    with torch.inference_mode():
        return decoder(ops, config, lambda n: SourceWeight(n, shapes[n], checkpoint))[0]


@only(*TINIES, *UNNORMED, *GEMMA4S)
def test_the_reference_gives_the_logits_of_transformers(tiny: TinyCheckpoint) -> None:
    ours = reference(tiny, TOKENS, tiny.open().config)
    theirs = eager_logits(tiny.model, TOKENS)
    assert (ours - theirs).abs().max() < 4e-5


def without_traits(config: GemmaConfig) -> dict[str, GemmaConfig]:
    """For each trait of the config, a copy that has this trait wrong or missing."""
    changes: dict[str, GemmaConfig] = {
        "query scale": replace(config, query_scale=config.head_dim**-0.5 * 1.01),
        "embedding scale": replace(config, embed_scale=config.embed_scale * 1.01),
    }
    if AttentionKind.LOCAL in config.kinds:
        changes["window"] = replace(config, sliding_window=WINDOW + 1)
    if config.attn_softcap is not None:
        changes["attention softcap"] = replace(config, attn_softcap=None)
        changes["final softcap"] = replace(config, final_softcap=None)
    local, full = config.ropes[AttentionKind.LOCAL], config.ropes[AttentionKind.GLOBAL]
    if config.value_norm:
        changes["norm of values"] = replace(config, value_norm=False)
        changes["layer scalars"] = replace(config, layer_scalars=False)
    if config.per_layer:
        other = config.per_layer_scale * 1.05
        changes["scale of per-layer embeddings"] = replace(config, per_layer_scale=other)
    if full.rotated != 1:
        whole = replace(full, rotated=1.0)
        changes["partial rope"] = replace(
            config, ropes={**config.ropes, AttentionKind.GLOBAL: whole}
        )
    elif local != full:
        changes["local rope"] = replace(config, ropes=dict.fromkeys(AttentionKind, full))
        changes["global rope"] = replace(config, ropes=dict.fromkeys(AttentionKind, local))
        unscaled = {AttentionKind.LOCAL: local, AttentionKind.GLOBAL: Rope(full.base, 1.0)}
        changes["rope factor"] = replace(config, ropes=unscaled)
    return changes


@only(*TINIES, *UNNORMED, *GEMMA4S)
def test_a_decoder_that_gets_one_trait_wrong_has_clearly_different_logits(
    tiny: TinyCheckpoint,
) -> None:
    """Shows that the test above can fail for every trait of Gemma."""
    expected = eager_logits(tiny.model, TOKENS)
    for trait, config in without_traits(tiny.open().config).items():
        difference = (reference(tiny, TOKENS, config) - expected).abs().max()
        assert difference > 1e-3, trait


def test_the_window_includes_the_query_itself() -> None:
    assert visible(6, window=3)[5].tolist() == [False, False, False, True, True, True]


def test_prompts_in_a_batch_do_not_affect_each_other(tiny: TinyCheckpoint) -> None:
    config, checkpoint = tiny.open().config, tiny.open()
    shapes = config.tensor_shapes()
    ops = TorchOps(torch.tensor([TOKENS[:40], TOKENS[40:80]]), config.rms_norm_eps)
    with torch.inference_mode():
        both = decoder(ops, config, lambda n: SourceWeight(n, shapes[n], checkpoint))
    assert torch.allclose(both[1], reference(tiny, TOKENS[40:80], config), atol=1e-5)


@only(*TINIES, *UNNORMED, *GEMMA4S)
def test_behind_the_last_cache_only_wanted_positions_are_computed(tiny: TinyCheckpoint) -> None:
    """A layer without a cache of its own needs no other positions: most of a prompt's work."""
    config, checkpoint = tiny.open().config, tiny.open()
    shapes = config.tensor_shapes()
    ops = _CountingOps(torch.tensor([TOKENS]), config.rms_norm_eps, judged=3)
    with torch.inference_mode():
        logits = decoder(ops, config, lambda n: SourceWeight(n, shapes[n], checkpoint))[0]

    assert (logits - eager_logits(tiny.model, TOKENS)[-3:]).abs().max() < 1e-4
    for layer in config.layers:
        for name, positions in ops.positions.items():
            if name.startswith(f"model.layers.{layer.index}."):
                before = "self_attn" in name and "o_proj" not in name
                is_narrow = layer.index > config.last_owner - (not before)
                assert positions == (3 if is_narrow else len(TOKENS)), name


class _CountingOps(TorchOps):
    """Records how many positions each matrix multiplies."""

    positions: dict[str, int]

    def project(self, x: torch.Tensor, weights: Sequence[Weight]) -> list[torch.Tensor]:
        self.positions = getattr(self, "positions", {})
        self.positions |= {weight.name: x.shape[1] for weight in weights}
        return super().project(x, weights)
