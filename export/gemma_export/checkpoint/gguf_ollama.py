"""Translates the keys of Ollama's own converter for Gemma 3 to llama.cpp's.

Source: Ollama `convert/convert_gemma3.go` and `model/models/gemma3/model_text.go`.
"""

from collections.abc import Mapping

from gemma_runtime.formats.gguf import Value

_PREFIX = "gemma3."
_OLLAMA_ONLY = ("rope.local.freq_base", "rope.global.freq_base", "mm.tokens_per_image")
# Its multimodal files leave these out; its runtime uses these values.
_DEFAULTS: Mapping[str, Value] = {
    "rope.freq_base": 1_000_000.0,
    "rope.freq_base_swa": 10_000.0,
    "attention.layer_norm_rms_epsilon": 1e-6,
}
_RENAMED = {
    "rope.global.freq_base": "rope.freq_base",
    "rope.local.freq_base": "rope.freq_base_swa",
}
_SCALED_LAYERS = (34, 48, 62)  # of 4b, 12b and 27b, whose rope factor its files leave out
_FACTOR = "rope.scaling.factor"
_SOFTCAP = "final_logit_softcapping"  # its files have 30, which no Gemma 3 was trained with


def translate_ollama(metadata: Mapping[str, Value]) -> Mapping[str, Value]:
    """The metadata with llama.cpp's keys; those of other converters are returned unchanged."""
    if not any(_PREFIX + key in metadata for key in _OLLAMA_ONLY):
        return metadata
    found = {
        key: value
        for key, value in metadata.items()
        if not key.startswith((_PREFIX + "vision.", _PREFIX + "mm."))
    }
    for old, new in _RENAMED.items():
        if _PREFIX + old in found:
            found[_PREFIX + new] = found.pop(_PREFIX + old)
    found.pop(_PREFIX + _SOFTCAP, None)
    for key, value in _DEFAULTS.items():
        found.setdefault(_PREFIX + key, value)
    if found.get(_PREFIX + "block_count") in _SCALED_LAYERS:
        found.setdefault(_PREFIX + _FACTOR, 8.0)
    return found
