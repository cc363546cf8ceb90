"""Bundles of `--target hf`: other engines run them."""

from typing import NoReturn

from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import SessionError


def open_hf_session(bundle: Bundle, threads: int | None, graph: str) -> NoReturn:
    """Raises SessionError: there is no runtime for such a folder without torch."""
    raise SessionError(
        f"{bundle.directory} is a Hugging Face folder, which gemma-runtime can't run; run it with "
        "transformers or vLLM, or export with --target onnx"
    )
