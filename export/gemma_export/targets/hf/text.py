"""Writes the settings of tokenizer and generation for transformers.

`tokenizer.json` itself is part of every bundle.
"""

from pathlib import Path
from typing import Any

from gemma_export.targets import ExportJob
from gemma_export.targets.shared.tokenizer_files import write_json, write_tokenizer_files


def write_text_files(job: ExportJob, folder: Path) -> None:
    write_json(folder / "generation_config.json", _generation(job))
    if job.tokenizer is not None:
        write_tokenizer_files(job.tokenizer, job.config, folder)


def _generation(job: ExportJob) -> dict[str, Any]:
    """The stop tokens and sampling values of the manifest."""
    fields = {"bos_token_id": job.config.bos_token, "eos_token_id": list(job.stop_tokens)}
    sampling = job.checkpoint.generation.sampling
    if sampling is None:
        return fields
    values = {"repetition_penalty": sampling.repetition_penalty}
    if is_sampled := sampling.temperature > 0:
        values |= {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
        }
    return fields | {"do_sample": is_sampled} | values
