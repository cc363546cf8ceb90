"""The Android app's Gradle files, as far as they can be checked without Gradle."""

import os
import re
import tomllib
from hashlib import sha256
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import pytest
from android_demo.pack_apk import pack, problems

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


LIBRARY = "lib/arm64-v8a/libx.so"


def apk(folder: Path) -> Path:
    with ZipFile(folder / "base.apk", "w") as base:
        base.writestr("AndroidManifest.xml", bytes(99), ZIP_DEFLATED)
        base.writestr("res/icon.png", bytes(5), ZIP_STORED)
        base.writestr("resources.arsc", bytes(33), ZIP_STORED)
    with ZipFile(folder / "dex.zip", "w") as dex:
        dex.writestr("classes.dex", b"dex\n038\0")
        dex.writestr("META-INF/services/x", b"not for phones")
    for name in ("libx.so", "liby.so"):
        (folder / name).write_bytes(name.encode() * 3000)
    pack(folder / "base.apk", folder / "dex.zip", folder, folder / "app.apk")
    return folder / "app.apk"


def test_an_apks_libraries_lie_where_a_page_of_16_kb_can_begin(tmp_path: Path) -> None:
    packed = apk(tmp_path)
    assert problems(packed) == []
    content = packed.read_bytes()
    assert {content.index(name * 3000) % 16384 for name in (b"libx.so", b"liby.so")} == {0}
    with ZipFile(packed) as archive:
        assert archive.read(LIBRARY) == (tmp_path / "libx.so").read_bytes()
        assert "META-INF/services/x" not in archive.namelist()


@pytest.mark.parametrize(
    ("name", "content", "method", "wrong"),
    [
        (LIBRARY, bytes(9), ZIP_STORED, "no multiple of 16384"),
        (LIBRARY, bytes(9), ZIP_DEFLATED, "is deflated"),
        ("resources.arsc", bytes(9), ZIP_DEFLATED, "is deflated"),
        ("resources.arsc", bytes(9), ZIP_STORED, "no multiple of 4"),
        ("classes.dex", b"class", ZIP_STORED, "is no dex file"),
        ("lib/x86/libx.so", bytes(9), ZIP_STORED, "is for another processor"),
        (LIBRARY, None, 0, "there is no native library"),
        ("classes.dex", None, 0, "there is no classes.dex"),
    ],
)
def test_what_is_wrong_with_an_apk_is_named(
    name: str, content: bytes | None, method: int, wrong: str, tmp_path: Path
) -> None:
    with ZipFile(apk(tmp_path)) as source, ZipFile(tmp_path / "other.apk", "w") as other:
        for entry in source.namelist():
            if entry != name and (content is not None or not entry.startswith(name[:4])):
                other.writestr(entry, source.read(entry))
        if content is not None:
            other.writestr(name, content, method)
    assert any(wrong in problem for problem in problems(tmp_path / "other.apk"))


def test_a_damaged_apk_is_named(tmp_path: Path) -> None:
    packed = apk(tmp_path)
    content = packed.read_bytes()
    packed.write_bytes(content.replace(b"liby.so" * 9, b"liby.sO" * 9, 1))
    assert problems(packed) == ["lib/arm64-v8a/liby.so is damaged"]
