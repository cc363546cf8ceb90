"""Run, check and measure bundles that gemma-export wrote. Needs no torch.

    bundle = open_bundle("out/gemma-3-270m-it-int4-onnx")
    with open_session(bundle) as session:
        logits = session.prefill([2, 651, 5253])

A backend's runtime is imported by `open_session`, not before.
"""

from gemma_runtime.bundle import Bundle, open_bundle
from gemma_runtime.errors import (
    BundleError,
    ContextFull,
    GemmaError,
    MissingExtra,
    SessionError,
    TokenizerError,
)
from gemma_runtime.manifest import SCHEMA_VERSION, Agreement, AttentionKind, LayerCache, Manifest
from gemma_runtime.privacy import opt_out
from gemma_runtime.proof.agreement import compare_logits
from gemma_runtime.proof.goldens import Golden, TopLogits, load_goldens
from gemma_runtime.proof.verify import Limits, Verdict, Verification, verify, verify_bundle
from gemma_runtime.session import FakeSession, Session, open_session
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.generate import (
    Conversation,
    Generation,
    StopReason,
    TextGeneration,
    generate,
    generate_text,
)
from gemma_runtime.text.sampler import Sampling
from gemma_runtime.text.tokenizer import Tokenizer, load_tokenizer

opt_out()  # before any library that collects usage statistics is imported

__all__ = [
    "SCHEMA_VERSION",
    "Agreement",
    "AttentionKind",
    "Bundle",
    "BundleError",
    "ContextFull",
    "Conversation",
    "FakeSession",
    "GemmaError",
    "Generation",
    "Golden",
    "LayerCache",
    "Limits",
    "Manifest",
    "Message",
    "MissingExtra",
    "Sampling",
    "Session",
    "SessionError",
    "StopReason",
    "TextGeneration",
    "Tokenizer",
    "TokenizerError",
    "TopLogits",
    "Verdict",
    "Verification",
    "compare_logits",
    "encode_chat",
    "generate",
    "generate_text",
    "load_goldens",
    "load_tokenizer",
    "open_bundle",
    "open_session",
    "verify",
    "verify_bundle",
]
