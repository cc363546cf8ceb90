"""The cores of both apps, in Kotlin and Swift, have the same public types but for those listed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KOTLIN = ROOT / "android_demo" / "core" / "src" / "main" / "kotlin"
SWIFT = ROOT / "ios_demo" / "GemmaKit" / "Sources" / "GemmaKit"

_KOTLIN_TYPE = re.compile(
    r"^(?:public )?(?:sealed |data |enum |abstract |open |fun |value |annotation )*"
    r"(?:class|interface|object|typealias) (\w+)",
    re.MULTILINE,
)
_SWIFT_TYPE = re.compile(
    r"^public (?:final |indirect )*(?:class|struct|enum|protocol|actor|typealias) (\w+)",
    re.MULTILINE,
)

# Kotlin's name, Swift's name and why they differ.
_RENAMED = [
    ("Bundle", "ModelBundle", "Foundation has a Bundle of its own"),
    ("GemmaException", "GemmaError", "each language's word for what is thrown"),
    ("Json", "JSON", "Swift's convention for acronyms"),
    ("JsonObject", "JSONObject", "Swift's convention for acronyms"),
    ("SavedChats", "ChatStore", "Swift's also holds the app's state"),
    ("CheckedBundles", "CheckedFiles", "Kotlin remembers bundles, Swift files"),
]
_ONLY_KOTLIN = {
    **dict.fromkeys(
        [
            *("BundleException", "SessionException", "ContextFullException", "DownloadException"),
            *("TokenizerException", "SchemaException", "JsonException"),
        ],
        "a case of Swift's enum GemmaError",
    ),
    "StorageException": "Swift passes on what Foundation throws, whose text is for users",
    **dict.fromkeys(
        ["JsonArray", "JsonBoolean", "JsonNull", "JsonNumber", "JsonString"],
        "a case of Swift's enum JSON",
    ),
    **dict.fromkeys(
        ["Model", "Quantization", "Target"], "Swift's Manifest has their fields itself"
    ),
    **dict.fromkeys(
        ["Drafter", "PromptLookup"], "iOS has no drafts: its programs give one row of logits"
    ),
    "FoldedThought": "SwiftUI's DisclosureGroup folds",
    "FreeMemory": "iOS warns only when memory is low",
    "BundleSummary": "iOS lists bundles by name alone",
    "Talk": "in Swift, ModelActor keeps the chat and its conversation together",
}
_ONLY_SWIFT = {
    "AppState": "Android keeps it in SharedPreferences",
    "CheckedFile": "Kotlin keeps one line of text for each bundle",
    "ComputeUnits": "a choice of Apple's runtimes; Android's is a number of threads",
    "EngineOpener": "a function type without a name in Kotlin",
    "OwnThread": "Kotlin has dispatchers",
    "ReplyEvent": "Kotlin's replies are a Flow of pieces",
    **dict.fromkeys(
        [
            *("CoreAIEngine", "CoreMLEngine", "CoreMLInputs", "CoreMLPart", "CoreMLValue"),
            *("EmbeddingTable", "Rope"),
        ],
        "of Core ML and Core AI, whose programs are given masks, angles and rows of tables",
    ),
}


def test_both_cores_have_the_same_types_or_say_why_not() -> None:
    kotlin, swift = _types(KOTLIN, "kt", _KOTLIN_TYPE), _types(SWIFT, "swift", _SWIFT_TYPE)
    assert len(kotlin & swift) > 50
    kotlin_names, swift_names = {name for name, _, _ in _RENAMED}, {name for _, name, _ in _RENAMED}
    assert kotlin - swift == kotlin_names | _ONLY_KOTLIN.keys()
    assert swift - kotlin == swift_names | _ONLY_SWIFT.keys()


@pytest.mark.parametrize(
    ("pattern", "declared", "hidden"),
    [
        (
            _KOTLIN_TYPE,
            ["data class A(val b: Int)", "fun interface B", "sealed class C", "object D"],
            ["internal class F", "private object G", "    class H", "fun class_i()"],
        ),
        (
            _SWIFT_TYPE,
            ["public struct A: Sendable {", "public final class B {", "public indirect enum C {"],
            ["struct F {", "    public struct G {", "private enum H {", "public func i() {}"],
        ),
    ],
)
def test_only_public_types_at_the_top_of_a_file_count(
    pattern: re.Pattern[str], declared: list[str], hidden: list[str]
) -> None:
    names = pattern.findall("\n".join([*declared, *hidden]))
    assert names == ["A", "B", "C", "D"][: len(declared)]


def _types(folder: Path, suffix: str, pattern: re.Pattern[str]) -> set[str]:
    files = sorted(folder.rglob(f"*.{suffix}"))
    return {name for path in files for name in pattern.findall(path.read_text("utf-8"))}
