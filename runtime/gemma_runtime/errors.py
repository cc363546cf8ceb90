"""The errors that users can cause, as one tree.

GemmaError                one line; the command line prints it and exits with 1
├── BundleError           a bundle is missing, altered, or has another schema
├── SignatureError        a bundle is not signed by the key, or a key can't be used
├── SessionError          the artifact can't be loaded or run
│   └── ContextFull       the next token doesn't fit into the context
├── TokenizerError        the bundle has no tokenizer, or text can't be encoded
├── BakedError            a baked prefix is stale, broken, or not how a prompt begins
├── ConstraintError       a schema, regex or grammar for a reply can't be guaranteed
├── EvaluationError       a task can't be run, or two runs can't be compared
├── ReportError           a file has no figures, or those of another bundle
├── MissingExtra          a package is not installed; the message names the pip command
├── CheckpointError       weights are missing, broken, or of an unsupported kind
├── ConfigError           config.json or GGUF metadata doesn't describe a supported Gemma
├── RecipeError           a quantization recipe is wrong
├── TargetError           the target doesn't support the recipe
├── SearchError           a search file is wrong, or a search can't be run
├── DeviceError           torch has no such device
├── RankError             ranks of torchrun can't share the work, or one was lost
├── HubError              the hub is unreachable, the model is gated, or no token is set
├── CacheError            the cache folder can't be written, or holds no such entry
└── MemoryLimit           the export would need more memory than --max-ram or --max-vram
"""

from collections.abc import Iterable
from difflib import get_close_matches

_LONGEST = 1500  # characters of a message
_START = 1000  # characters of a longer message that are kept before the gap


class GemmaError(Exception):
    """The root of all errors. The message is one line that tells the user what to do.

    It may quote a file that nobody trusts, so white space becomes blanks, other characters that a
    terminal doesn't print are written as escapes, and a long message is cut in its middle.
    """

    def __init__(self, message: str = "") -> None:
        line = "".join(map(_shown, " ".join(message.split()))).strip()
        if len(line) > _LONGEST:
            line = f"{line[:_START]} … {line[_START - _LONGEST :]}"
        super().__init__(line)


class BundleError(GemmaError):
    pass


class SignatureError(GemmaError):
    pass


class SessionError(GemmaError):
    pass


class ContextFull(SessionError):
    pass


class TokenizerError(GemmaError):
    pass


class BakedError(GemmaError):
    pass


class ConstraintError(GemmaError):
    pass


class EvaluationError(GemmaError):
    pass


class ReportError(GemmaError):
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


class SearchError(GemmaError):
    pass


class DeviceError(GemmaError):
    pass


class RankError(GemmaError):
    pass


class HubError(GemmaError):
    pass


class CacheError(GemmaError):
    pass


class MemoryLimit(GemmaError):
    pass


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


def nearest_first(name: str, choices: Iterable[str]) -> str:
    """The choices joined for an error message, most similar to `name` first."""
    known = list(choices)
    return ", ".join(get_close_matches(name, known, n=len(known), cutoff=0.0))
