"""Switches off the usage statistics that other libraries collect by default: docs/privacy.md."""

import os

OPT_OUTS = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime from 1.29 on, onnxruntime-genai
    "ORT_TELEMETRY_DISABLED": "1",  # the name in builds before the release of 1.29
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets and evaluate, which lm_eval uses
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, hf_xet, transformers
    "RAY_USAGE_STATS_ENABLED": "0",  # ray
}


def opt_out() -> None:
    """Set the variables that are not set yet, so a user's own choice wins.

    The libraries read them once, while they load, so this must run before they are imported.
    """
    for name, value in OPT_OUTS.items():
        os.environ.setdefault(name, value)
