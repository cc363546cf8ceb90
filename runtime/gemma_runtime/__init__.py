"""Run, check and measure bundles that gemma-export wrote. Needs no torch.

    bundle = open_bundle("out/gemma-3-270m-it-int4-onnx")
    with open_session(bundle) as session:
        logits = session.prefill([2, 651, 5253])

Importing the package loads nothing: a name is imported when it is first used, and a backend's
runtime by `open_session`.
"""

from typing import TYPE_CHECKING

from gemma_runtime.lazy import lazy_names
from gemma_runtime.privacy import opt_out

if TYPE_CHECKING:
    from gemma_runtime.backend_table import Limits
    from gemma_runtime.bundle import Bundle, open_bundle
    from gemma_runtime.embedding.embedder import Embedder, open_embedder
    from gemma_runtime.embedding_bundle import EmbeddingBundle, open_embedding_bundle
    from gemma_runtime.errors import (
        BakedError,
        BundleError,
        ConstraintError,
        ContextFull,
        GemmaError,
        MissingExtra,
        SessionError,
        TokenizerError,
    )
    from gemma_runtime.manifest import (
        SCHEMA_VERSION,
        Agreement,
        AttentionKind,
        LayerCache,
        Manifest,
    )
    from gemma_runtime.marks import Mark
    from gemma_runtime.proof.agreement import compare_logits
    from gemma_runtime.proof.goldens import Golden, TopLogits, load_goldens
    from gemma_runtime.proof.verify import Verdict, Verification, verify, verify_bundle
    from gemma_runtime.session import FakeSession, Session, open_session
    from gemma_runtime.snapshot import Snapshot
    from gemma_runtime.text.ask_json import JsonAnswer, ask_json
    from gemma_runtime.text.baked import Baked, bake, open_baked
    from gemma_runtime.text.chat import Message, encode_chat
    from gemma_runtime.text.constraint import Constraint
    from gemma_runtime.text.conversation import Conversation
    from gemma_runtime.text.generate import (
        Generation,
        StopReason,
        TextGeneration,
        generate,
        generate_text,
    )
    from gemma_runtime.text.guard import SHIELD_POLICIES, ContentGuard, Guard, Policy
    from gemma_runtime.text.guarded import GuardedConversation, Withheld
    from gemma_runtime.text.json_schema import Violation
    from gemma_runtime.text.matcher import Matcher
    from gemma_runtime.text.opening import Opening
    from gemma_runtime.text.sampler import Sampling
    from gemma_runtime.text.shared_prefix import feed
    from gemma_runtime.text.tokenizer import Tokenizer, load_tokenizer
    from gemma_runtime.text.tools import ToolCall, read_tools

    __version__: str

opt_out()  # before any library that collects usage statistics is imported

__all__ = [
    "SCHEMA_VERSION",
    "SHIELD_POLICIES",
    "Agreement",
    "AttentionKind",
    "Baked",
    "BakedError",
    "Bundle",
    "BundleError",
    "Constraint",
    "ConstraintError",
    "ContentGuard",
    "ContextFull",
    "Conversation",
    "Embedder",
    "EmbeddingBundle",
    "FakeSession",
    "GemmaError",
    "Generation",
    "Golden",
    "Guard",
    "GuardedConversation",
    "JsonAnswer",
    "LayerCache",
    "Limits",
    "Manifest",
    "Mark",
    "Matcher",
    "Message",
    "MissingExtra",
    "Opening",
    "Policy",
    "Sampling",
    "Session",
    "SessionError",
    "Snapshot",
    "StopReason",
    "TextGeneration",
    "Tokenizer",
    "TokenizerError",
    "ToolCall",
    "TopLogits",
    "Verdict",
    "Verification",
    "Violation",
    "Withheld",
    "__version__",
    "ask_json",
    "bake",
    "compare_logits",
    "encode_chat",
    "feed",
    "generate",
    "generate_text",
    "load_goldens",
    "load_tokenizer",
    "open_baked",
    "open_bundle",
    "open_embedder",
    "open_embedding_bundle",
    "open_session",
    "read_tools",
    "verify",
    "verify_bundle",
]

_HOMES = {
    "gemma_runtime.backend_table": ("Limits",),
    "gemma_runtime.bundle": ("Bundle", "open_bundle"),
    "gemma_runtime.embedding.embedder": ("Embedder", "open_embedder"),
    "gemma_runtime.embedding_bundle": ("EmbeddingBundle", "open_embedding_bundle"),
    "gemma_runtime.errors": (
        "BakedError",
        "BundleError",
        "ConstraintError",
        "ContextFull",
        "GemmaError",
        "MissingExtra",
        "SessionError",
        "TokenizerError",
    ),
    "gemma_runtime.manifest": (
        "SCHEMA_VERSION",
        "Agreement",
        "AttentionKind",
        "LayerCache",
        "Manifest",
    ),
    "gemma_runtime.marks": ("Mark",),
    "gemma_runtime.proof.agreement": ("compare_logits",),
    "gemma_runtime.proof.goldens": ("Golden", "TopLogits", "load_goldens"),
    "gemma_runtime.proof.verify": ("Verdict", "Verification", "verify", "verify_bundle"),
    "gemma_runtime.session": ("FakeSession", "Session", "open_session"),
    "gemma_runtime.snapshot": ("Snapshot",),
    "gemma_runtime.text.ask_json": ("JsonAnswer", "ask_json"),
    "gemma_runtime.text.baked": ("Baked", "bake", "open_baked"),
    "gemma_runtime.text.chat": ("Message", "encode_chat"),
    "gemma_runtime.text.constraint": ("Constraint",),
    "gemma_runtime.text.conversation": ("Conversation",),
    "gemma_runtime.text.generate": (
        "Generation",
        "StopReason",
        "TextGeneration",
        "generate",
        "generate_text",
    ),
    "gemma_runtime.text.guard": ("SHIELD_POLICIES", "ContentGuard", "Guard", "Policy"),
    "gemma_runtime.text.guarded": ("GuardedConversation", "Withheld"),
    "gemma_runtime.text.json_schema": ("Violation",),
    "gemma_runtime.text.matcher": ("Matcher",),
    "gemma_runtime.text.opening": ("Opening",),
    "gemma_runtime.text.sampler": ("Sampling",),
    "gemma_runtime.text.shared_prefix": ("feed",),
    "gemma_runtime.text.tokenizer": ("Tokenizer", "load_tokenizer"),
    "gemma_runtime.text.tools": ("ToolCall", "read_tools"),
}

if not TYPE_CHECKING:  # else every misspelt name would pass the type checker
    __getattr__ = lazy_names(__name__, _HOMES)

    def __dir__() -> list[str]:
        return sorted(__all__)
