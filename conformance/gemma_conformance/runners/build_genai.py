"""Runs the model builder of onnxruntime-genai, with its own arguments.

The builder reads the settings of Gemma 3's rope as transformers 4 named them. transformers 5 nests
them, and builds its own model from the nested ones: so only what the builder reads is flattened.
"""

import copy
import runpy
from typing import Any

import onnxruntime_genai.models  # noqa: F401  it makes the next import possible
from builders import gemma  # type: ignore[import-not-found]

_first = gemma.Gemma3Model.__init__


def _flat(self: Any, config: Any, *others: Any) -> None:
    ropes = config.rope_parameters
    if "sliding_attention" in ropes:
        config = copy.deepcopy(config)
        config.rope_local_base_freq = ropes["sliding_attention"]["rope_theta"]
        config.rope_theta = ropes["full_attention"]["rope_theta"]
        config.rope_parameters = dict(ropes["full_attention"])
    _first(self, config, *others)


if __name__ == "__main__":
    gemma.Gemma3Model.__init__ = _flat
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
