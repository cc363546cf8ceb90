"""Everything a user can get wrong, as one tree.

GemmaError                one clear line; the command line prints it and exits with 1
├── BundleError           a bundle is missing, altered, or of another schema
├── SessionError          the artifact can't be loaded or run
│   └── ContextFull       the next token would not fit into the cache
├── TokenizerError        the bundle has no tokenizer, or text can't be encoded
├── MissingExtra          a package is not installed; the message is the pip command
├── CheckpointError       weights are missing, broken, or of a kind we refuse
├── ConfigError           config.json or GGUF metadata describes no Gemma we know
├── RecipeError           a quantization recipe is wrong
├── TargetError           the target can't hold what the recipe asks for
├── HubError              the hub is out of reach, the model is gated, or no token is set
├── CacheError            the cache folder can't be written, or holds no such entry
└── MemoryLimit           --max-ram can't be kept
"""

from collections.abc import Iterable
from difflib import get_close_matches


class GemmaError(Exception):
    """The root: a sentence a user can act on."""


class BundleError(GemmaError):
    pass


class SessionError(GemmaError):
    pass


class ContextFull(SessionError):
    pass


class TokenizerError(GemmaError):
    pass


class MissingExtra(GemmaError):
    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed; run: pip install 'gemma-export[{extra}]'"
            if extra
            else f"{package} is not installed; run: pip install gemma-export"
        )


class CheckpointError(GemmaError):
    pass


class ConfigError(GemmaError):
    pass


class RecipeError(GemmaError):
    pass


class TargetError(GemmaError):
    pass


class HubError(GemmaError):
    pass


class CacheError(GemmaError):
    pass


class MemoryLimit(GemmaError):
    pass


def nearest_first(name: str, choices: Iterable[str]) -> str:
    """The choices for an error line about `name`, most alike first."""
    known = list(choices)
    return ", ".join(get_close_matches(name, known, n=len(known), cutoff=0.0))
