"""Scales of int8 caches, compared with keys at every position, and with interrupted work."""

from pathlib import Path

import pytest
import torch

from gemma_export.model.batch_ops import BatchOps, hold
from gemma_export.model.config import LayerSpec
from gemma_export.model.decoder import decoder
from gemma_export.model.int8_cache import round_cached, scales_digest
from gemma_export.model.torch_ops import rotate, split_heads
from gemma_export.progress import unheard
from gemma_export.quantize.calibrate import layer_weights
from gemma_export.quantize.calibrate.cache_scales import (
    largest_keys,
    measure_caches,
    measured_bytes,
    measured_scales,
    value_scales,
)
from gemma_export.quantize.calibrate.text import LENGTH
from gemma_export.quantize.store import open_or_build_store
from gemma_runtime.manifest import Rope
from tests.data.tiny_bundle import build
from tests.export.conftest import RandomText, only
from tests.export.models import E2B, GEMMA2, GEMMA3, GEMMA4S, UNNORMED

CONTEXT = 100


@pytest.mark.parametrize("context", [1, 5, 40, 3000])
@pytest.mark.parametrize("base", [100.0, 1e6])
def test_keys_are_bounded_at_every_position_and_the_bound_is_reached(
    context: int, base: float
) -> None:
    rope = Rope(base, 2.0)
    keys = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(1))
    everywhere = torch.zeros(3, 16)
    for batch in keys[:, :, 1:]:  # the first token stays at position 0
        placed = rotate(batch[:, :, None].expand(-1, -1, context, -1).flatten(0, 1)[None], rope)
        largest = placed[0].abs().amax(1).view(3, 4, 16).amax(1)
        everywhere = torch.maximum(everywhere, largest)
    everywhere = torch.maximum(everywhere, keys[:, :, 0].abs().amax(0))

    bound = largest_keys(keys, rope, context)

    assert (bound >= everywhere * (1 - 1e-5)).all()
    # Positions are whole numbers, so a fast pair may miss its largest value a little.
    assert (bound <= everywhere * (1.001 if context == 3000 else 2)).all()


def test_a_dead_channel_gets_a_scale_and_values_are_clipped_to_int8() -> None:
    scales = torch.tensor([[0.5, 1.0]])
    x = torch.tensor([[[[0.25, 0.0], [0.75, 0.0], [500.0, 0.0], [-500.0, 0.0]]]])
    expected = torch.tensor([0.0, 1.0, 63.5, -64.0])  # halves go to even

    assert torch.equal(round_cached(x, scales)[0, 0, :, 0], expected)


def test_values_that_get_attention_lose_less_than_with_the_largest_value_as_range() -> None:
    """The first token gets most of it, and its values are far below a step of the others."""
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(4, 2, 50, 16, generator=draw)
    values[:, :, 0] = torch.rand(16, generator=draw) * 0.02
    attention = torch.full((4, 2, 50), 0.01)
    attention[:, :, 0] = 30.0

    def lost(scales: torch.Tensor) -> torch.Tensor:
        error = (round_cached(values, scales) - values).square()
        return (error * attention[..., None]).sum((0, 2))

    whole = values.abs().amax((0, 2)) / 127
    best = value_scales(values, attention)
    assert (lost(best) <= lost(whole) * 1.0001).all()
    assert lost(best).sum() < lost(whole).sum() * 0.8


@only(GEMMA2, GEMMA3, *UNNORMED, *GEMMA4S)
def test_scales_are_the_largest_values_of_the_stored_weights(
    random_text: RandomText, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are computed layer by layer; here, the whole model runs at once."""
    monkeypatch.setattr(layer_weights, "product_dtype", lambda device: torch.float32)
    work = random_text("int4", 4)
    store = open_or_build_store(work.checkpoint, work.recipe)
    measure_caches(work, store, CONTEXT, unheard)
    config, seen = work.checkpoint.config, {}

    class Watching(BatchOps):
        def attend(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerSpec
        ) -> torch.Tensor:
            seen[layer.index] = tuple(split_heads(x, layer.kv_heads) for x in (k, v))
            return super().attend(q, k, v, layer)

    names = config.tensor_shapes()
    weights = hold({n: store.weight(n).rows(0, store.shapes[n][0]) for n in names})
    with torch.inference_mode():
        decoder(Watching(work.calibration.tokens, config.rms_norm_eps), config, weights.__getitem__)
    for scales, layer in zip(measured_scales(work, CONTEXT), config.layers, strict=True):
        keys, values = seen[layer.source]
        expected = largest_keys(keys, layer.rope, CONTEXT)
        assert torch.allclose(scales.keys * 127, expected, rtol=0.02)
        ranges = scales.values * 127 / values.abs().amax((0, 2))
        assert (ranges >= 0.39).all()
        assert (ranges <= 1.17).all()
        inside = rotate(keys, layer.rope)
        assert ((round_cached(inside, scales.keys) - inside).abs() <= scales.keys[:, None]).all()


def test_the_user_s_text_decides_the_scales_and_not_the_codes(tmp_path: Path) -> None:
    """Of a recipe that reads no text itself."""
    texts = [tmp_path / name for name in ("one.txt", "other.txt")]
    for path, words in zip(texts, ("the user in the inn ", "1 + 2 = 3; "), strict=True):
        path.write_text(words * 200)

    manifests = [
        build(tmp_path / path.stem, cache="int8", calibration=path).manifest for path in texts
    ]

    one, other = (manifest.int8_caches for manifest in manifests)
    assert one is not None
    assert other is not None
    assert (one.calibration.source, other.calibration.source) == tuple(map(str, texts))
    assert one.calibration.tokens % LENGTH == 0
    assert one.scales_digest != other.scales_digest
    codes = {manifest.quantization.codes_digest for manifest in manifests}
    assert len(codes) == 1
    assert {manifest.quantization.calibration for manifest in manifests} == {None}


class Interrupted(Exception):
    pass


@only(GEMMA3, E2B)
def test_interrupted_measuring_resumes_to_the_same_scales(
    random_text: RandomText,
) -> None:
    work = random_text("int4", 4)
    store = open_or_build_store(work.checkpoint, work.recipe)
    measured: list[str] = []

    def stop(name: str, done: int) -> None:
        del done
        measured.append(name)
        if len(measured) == 3:
            raise Interrupted

    whole = measured_bytes(work, CONTEXT)
    with pytest.raises(Interrupted):
        measure_caches(work, store, CONTEXT, stop)
    assert 0 < measured_bytes(work, CONTEXT) < whole
    measure_caches(work, store, CONTEXT, lambda name, done: measured.append(name))
    layers = range(len(work.checkpoint.config.kinds))
    assert measured == [f"layer {index}" for index in layers]
    assert measured_bytes(work, CONTEXT) == 0
    resumed = scales_digest(measured_scales(work, CONTEXT))

    measure_caches(work, store, CONTEXT + 1, unheard)
    other = measured_scales(work, CONTEXT + 1)
    assert scales_digest(other) != resumed  # a longer context turns keys further
    for path in work.cache_scales(CONTEXT):
        path.unlink()
    measure_caches(work, store, CONTEXT, unheard)
    assert scales_digest(measured_scales(work, CONTEXT)) == resumed
    assert not any(path.exists() for path in work.cache_residuals(CONTEXT))
