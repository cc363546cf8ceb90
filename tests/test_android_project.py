"""The Android app's Gradle files, as far as they can be checked without Gradle."""

import os
import re
import tomllib
from hashlib import sha256
from pathlib import Path

ANDROID = Path(__file__).parents[1] / "android_demo"
# Of Gradle 9.4, as Gradle publishes it: gradle/actions, wrapper-checksums.json.
WRAPPER = "55243ef57851f12b070ad14f7f5bb8302daceeebc5bce5ece5fa6edb23e1145c"
# Of gradle-9.4.1-bin.zip, from the same place.
DISTRIBUTION = "2ab2958f2a1e51120c326cad6f385153bb11ee93b3c216c5fccebfdfbb7ec6cb"


def read(name: str) -> str:
    return (ANDROID / name).read_text("utf-8")


def number(name: str) -> int:
    (value,) = re.findall(rf"^ +{name} = (\d+)$", read("app/build.gradle.kts"), re.MULTILINE)
    return int(value)


def versions() -> dict[str, str]:
    named: dict[str, str] = tomllib.loads(read("gradle/libs.versions.toml"))["versions"]
    return named


def test_the_wrapper_is_gradles_own_and_fetches_the_same_gradle_over_tls() -> None:
    """Whoever runs gradlew runs this file, and the Gradle that it fetches."""
    wrapper = ANDROID / "gradle/wrapper"
    assert sha256((wrapper / "gradle-wrapper.jar").read_bytes()).hexdigest() == WRAPPER
    properties = (wrapper / "gradle-wrapper.properties").read_text("utf-8").splitlines()
    place = "https\\://services.gradle.org/distributions"
    assert f"distributionUrl={place}/gradle-9.4.1-bin.zip" in properties
    assert f"distributionSha256Sum={DISTRIBUTION}" in properties
    assert "validateDistributionUrl=true" in properties
    assert os.access(ANDROID / "gradlew", os.X_OK)


def test_the_plugin_is_one_that_the_wrappers_gradle_runs_and_that_knows_the_sdk() -> None:
    """AGP 9.2 was made for Gradle 9.4 and SDK 37.0; 9.3 refuses to run on Gradle 9.4."""
    assert versions()["agp"].startswith("9.2.")
    assert number("compileSdk") == number("targetSdk") == 37


def test_the_target_sdk_is_named_in_one_place() -> None:
    """Else the package is checked for another SDK than Gradle builds for."""
    scripts = "".join(script.read_text("utf-8") for script in ANDROID.glob("*.sh"))
    assert re.findall(r"(?i)sdk\D{0,20}\b3[0-9]\b", scripts) == []
    assert "uses-sdk" not in read("app/src/main/AndroidManifest.xml")
    assert f"`compileSdk` and `targetSdk` are {number('targetSdk')}" in read("README.md")


def test_kotlin_and_onnxruntime_are_the_versions_that_the_tests_compile_and_run() -> None:
    scripts = read("test.sh") + (ANDROID.parent / "tests/data/onnxruntime_aar.sh").read_text()
    assert 'npm_package kotlin-compiler "$kotlin"' in scripts
    assert f"android/onnxruntime-{versions()['onnxruntime']}\n" in scripts


def test_every_version_and_every_alias_is_used() -> None:
    catalog = tomllib.loads(read("gradle/libs.versions.toml"))
    builds = "".join(file.read_text("utf-8") for file in ANDROID.rglob("*.gradle.kts"))
    used = set(re.findall(r"libs\.([\w.]+)", builds))
    named = [name for name in catalog["libraries"]]
    named += [f"plugins.{name}" for name in catalog["plugins"]]
    assert {name.replace("-", ".") for name in named} == used - {"versions.executorch.get"}
    entries = [*catalog["libraries"].values(), *catalog["plugins"].values()]
    assert {entry["version"]["ref"] for entry in entries} == set(catalog["versions"])
