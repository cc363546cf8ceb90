"""Compares CoreML.swift beside it with PyObjC's metadata, which is generated from Apple's headers.

    python ios_demo/stubs/check_coreml.py CACHE

Prints what differs and exits with 1. If PyPI can't be reached, prints SKIPPED and why.
"""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "pyobjc-framework-CoreML==12.2.2"
STUB = Path(__file__).parent / "CoreML.swift"
CASE = re.compile(r"case \w+ = (\d+)  // (ML\w+)")
SELECTOR = re.compile(r"// \[(ML\w+) ([\w:]+)\]")


def fetch(cache: Path) -> str:
    """The metadata's text. Raises CalledProcessError if the wheel can't be downloaded."""
    folder = cache / "pyobjc-coreml"
    if not list(folder.glob("*.whl")):
        platform = ["--platform=macosx_11_0_universal2", "--python-version=3.12"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", *platform, f"--dest={folder}", PACKAGE]
        subprocess.run(command, check=True, capture_output=True, text=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return wheel.read("CoreML/_metadata.py").decode()


def differences(stub: str, metadata: str) -> list[str]:
    values = dict(re.findall(r"\$(ML\w+)@(\d+)", metadata))
    selectors = set(re.findall(r'b"(ML\w+)",\s+b"([\w:]+)"', metadata))
    wrong = [
        f"{name} is {value}, Apple's header says {values.get(name)}"
        for value, name in CASE.findall(stub)
        if values.get(name) != value
    ]
    return wrong + [
        f"Apple's headers have no [{owner} {selector}]"
        for owner, selector in SELECTOR.findall(stub)
        if (owner, selector) not in selectors
    ]


def main(cache: Path) -> int:
    stub = STUB.read_text("utf-8")
    checked = len(CASE.findall(stub)) + len(SELECTOR.findall(stub))
    try:
        wrong = differences(stub, fetch(cache))
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["pip failed"])[-1]
        print(f"SKIPPED ios: Core ML's signatures, because {PACKAGE} can't be fetched: {reason}")
        return 0
    for line in wrong:
        print(f"error: ios_demo/stubs/CoreML.swift: {line}")
    if not wrong:
        print(f"ios: {checked} of Core ML's signatures and cases are as in Apple's headers")
    return 1 if wrong or not checked else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
