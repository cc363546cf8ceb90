"""The torch decoder gives the logits of transformers with eager attention."""

from dataclasses import replace

import numpy as np
import torch

from gemma_export.checkpoint import SourceWeight
from gemma_export.model.config import GemmaConfig
from gemma_export.model.decoder import decoder
from gemma_export.model.torch_ops import TorchOps, visible
from gemma_runtime.manifest import AttentionKind, Rope
from tests.export.conftest import TinyCheckpoint
from tests.export.models import WINDOW, eager_logits

TOKENS = np.random.default_rng(1).integers(0, 96, 100).tolist()  # six windows


def reference(tiny: TinyCheckpoint, tokens: list[int], config: GemmaConfig) -> torch.Tensor:
    checkpoint, shapes = tiny.open(), config.tensor_shapes()
    ops = TorchOps(torch.tensor([tokens]), config.rms_norm_eps)
    with torch.inference_mode():
        return decoder(ops, config, lambda n: SourceWeight(n, shapes[n], checkpoint))[0]


def test_the_reference_gives_the_logits_of_transformers(tiny: TinyCheckpoint) -> None:
    ours = reference(tiny, TOKENS, tiny.open().config)
    theirs = eager_logits(tiny.model, TOKENS)
    assert (ours - theirs).abs().max() < 2e-5


def without_traits(config: GemmaConfig) -> dict[str, GemmaConfig]:
    """For each trait of the config, a copy that has this trait wrong or missing."""
    changes: dict[str, GemmaConfig] = {
        "window": replace(config, sliding_window=WINDOW + 1),
        "query scale": replace(config, query_scale=config.head_dim**-0.5 * 1.01),
        "embedding scale": replace(config, embed_scale=config.embed_scale * 1.01),
    }
    if config.attn_softcap is not None:
        changes["attention softcap"] = replace(config, attn_softcap=None)
        changes["final softcap"] = replace(config, final_softcap=None)
    local, full = config.ropes[AttentionKind.LOCAL], config.ropes[AttentionKind.GLOBAL]
    if local != full:
        changes["local rope"] = replace(config, ropes=dict.fromkeys(AttentionKind, full))
        changes["global rope"] = replace(config, ropes=dict.fromkeys(AttentionKind, local))
        unscaled = {AttentionKind.LOCAL: local, AttentionKind.GLOBAL: Rope(full.base, 1.0)}
        changes["rope factor"] = replace(config, ropes=unscaled)
    return changes


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
