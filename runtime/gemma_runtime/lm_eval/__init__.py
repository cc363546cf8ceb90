"""Bundles as models of lm_eval: `--model gemma_bundle --model_args bundle=FOLDER`."""

from typing import TYPE_CHECKING

from gemma_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from gemma_runtime.lm_eval.model import GemmaBundle

__all__ = ["GemmaBundle"]

if not TYPE_CHECKING:
    __getattr__ = lazy_names(__name__, {"gemma_runtime.lm_eval.model": ("GemmaBundle",)})
