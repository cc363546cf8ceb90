"""The iOS app's project files, as far as they can be checked without Xcode."""

import plistlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ios_demo.stubs.check_coreml import STUB, differences

IOS = Path(__file__).parents[1] / "ios_demo"


def project(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((IOS / name).read_text("utf-8"))
    return content


def test_running_the_app_from_xcode_builds_it_with_optimization() -> None:
    """Xcode's default is Debug, in which Swift code is not optimized."""
    schemes = project("project.yml")["schemes"]
    assert {name: scheme["run"]["config"] for name, scheme in schemes.items()} == {
        "GemmaDemo": "Release"
    }


def test_local_packages_and_included_files_exist() -> None:
    base, executorch = project("project.yml"), project("project-executorch.yml")
    assert (IOS / executorch["include"]).is_file()
    packages = base["packages"] | executorch["packages"]
    for name, package in packages.items():
        manifest = (IOS / package["path"] / "Package.swift").read_text("utf-8")
        assert f'.library(name: "{name}"' in manifest
    used = {
        dependency["package"]
        for spec in (base, executorch)
        for dependency in spec["targets"]["GemmaDemo"]["dependencies"]
    }
    assert used == set(packages)
    # Static libraries whose kernels register themselves are otherwise left out by the linker.
    settings = executorch["targets"]["GemmaDemo"]["settings"]
    assert "-all_load" in settings["OTHER_LDFLAGS"]


def test_the_executorch_version_in_the_code_is_that_of_its_package() -> None:
    package = (IOS / "GemmaExecutorch" / "Package.swift").read_text("utf-8")
    source = IOS / "GemmaExecutorch" / "Sources" / "GemmaExecutorch" / "ExecutorchEngine.swift"
    (branch,) = re.findall(r'branch: "swiftpm-([\d.]+)"', package)
    (version,) = re.findall(r'executorchVersion = "([\d.]+)"', source.read_text("utf-8"))
    assert branch == version


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("case all = 2 ", "case all = 5 ", "MLComputeUnitsAll is 5"),
        ("usingState:error:]", "withState:error:]", "no [MLModel predictionFromFeatures:withState"),
    ],
)
def test_a_stub_unlike_apples_headers_is_named(old: str, new: str, message: str) -> None:
    stub = STUB.read_text("utf-8")
    metadata = "$MLComputeUnitsAll@2$" + "".join(
        f'b"{owner}",\n        b"{selector}",'
        for owner, selector in re.findall(r"// \[(ML\w+) ([\w:]+)\]", stub)
    )
    ours = [line for line in differences(stub, metadata) if "says None" not in line]
    assert ours == []
    assert old in stub
    wrong = differences(stub.replace(old, new), metadata)
    assert any(message in line for line in wrong)


def test_both_apps_and_the_packages_have_one_version() -> None:
    """Reports name the app's version, and XcodeGen's default is 1.0."""
    info = project("project.yml")["targets"]["GemmaDemo"]["info"]["properties"]
    gradle = (IOS.parent / "android_demo" / "app" / "build.gradle.kts").read_text("utf-8")
    python = (IOS.parent / "pyproject.toml").read_text("utf-8")
    (android,) = re.findall(r'versionName = "(.+)"', gradle)
    (package,) = re.findall(r'^version = "(.+)"', python, re.MULTILINE)
    assert info["CFBundleShortVersionString"] == android == package


# Calls for which Apple asks a reason, by category, and the reason that fits what this app does.
_REASONS = {
    "NSPrivacyAccessedAPICategoryDiskSpace": (
        r"\.systemFreeSize|volumeAvailableCapacity",
        "E174.1",
    ),
    "NSPrivacyAccessedAPICategoryFileTimestamp": (
        r"\.(?:modification|creation)Date|contentModificationDate|\bf?stat\(",
        "C617.1",
    ),
    "NSPrivacyAccessedAPICategoryUserDefaults": (r"\bUserDefaults\b|@AppStorage", None),
    "NSPrivacyAccessedAPICategorySystemBootTime": (r"systemUptime|mach_absolute_time", None),
    "NSPrivacyAccessedAPICategoryActiveKeyboards": (r"activeInputModes", None),
}


def test_the_privacy_manifest_names_what_the_code_calls_and_nothing_else() -> None:
    manifest = plistlib.loads((IOS / "GemmaDemo" / "PrivacyInfo.xcprivacy").read_bytes())
    told = {
        entry["NSPrivacyAccessedAPIType"]: entry["NSPrivacyAccessedAPITypeReasons"]
        for entry in manifest["NSPrivacyAccessedAPITypes"]
    }
    folders = ("GemmaDemo", "GemmaKit/Sources", "GemmaExecutorch/Sources")
    files = [path for folder in folders for path in (IOS / folder).rglob("*.swift")]
    code = "\n".join(path.read_text("utf-8") for path in files)
    called = {
        name: [reason] for name, (calls, reason) in _REASONS.items() if re.search(calls, code)
    }
    assert told == called
    assert manifest["NSPrivacyTracking"] is False
    assert manifest["NSPrivacyTrackingDomains"] == manifest["NSPrivacyCollectedDataTypes"] == []


def test_the_privacy_manifest_is_a_resource_of_the_app() -> None:
    """Among the sources, XcodeGen may leave it out of the app, where Apple looks for it."""
    sources, privacy = project("project.yml")["targets"]["GemmaDemo"]["sources"]
    assert privacy["buildPhase"] == "resources"
    assert (IOS / privacy["path"]).name == "PrivacyInfo.xcprivacy"
    assert sources == {"path": "GemmaDemo", "excludes": ["*.xcprivacy"]}
