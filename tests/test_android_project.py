"""The Android app's Gradle files, as far as they can be checked without Gradle."""

import os
from hashlib import sha256
from pathlib import Path

ANDROID = Path(__file__).parents[1] / "android_demo"
# Of Gradle 9.4's wrapper, as Gradle publishes it: gradle/actions, wrapper-checksums.json.
WRAPPER = "55243ef57851f12b070ad14f7f5bb8302daceeebc5bce5ece5fa6edb23e1145c"


def test_the_wrapper_is_gradles_own_and_fetches_gradle_over_tls() -> None:
    """Whoever runs gradlew runs this file."""
    wrapper = ANDROID / "gradle/wrapper"
    assert sha256((wrapper / "gradle-wrapper.jar").read_bytes()).hexdigest() == WRAPPER
    properties = (wrapper / "gradle-wrapper.properties").read_text("utf-8")
    assert "distributionUrl=https\\://services.gradle.org/distributions/gradle-" in properties
    assert "validateDistributionUrl=true" in properties
    assert os.access(ANDROID / "gradlew", os.X_OK)
