import pytest

from gemma_runtime.errors import SessionError
from gemma_runtime.session import check_runtime


@pytest.mark.parametrize(
    "installed", ["1.29", "1.29.0", "1.29.0+cpu", "1.29.1", "1.30.0rc1", "1.100.0", "2"]
)
def test_the_runtime_that_a_bundle_needs_and_newer_ones_are_taken(installed: str) -> None:
    """`1.29` was refused where 1.29.0 is needed."""
    check_runtime("onnxruntime", installed, "1.29.0")


@pytest.mark.parametrize("installed", ["1.28.9", "1.29.0rc1", "1.3", "0.99.0"])
def test_an_older_runtime_is_refused(installed: str) -> None:
    with pytest.raises(SessionError, match=rf"onnxruntime {installed}.*needs 1\.29\.0"):
        check_runtime("onnxruntime", installed, "1.29.0")


def test_one_patch_too_old_is_refused() -> None:
    with pytest.raises(SessionError, match=r"1\.24\.3 is too old.*needs 1\.24\.4"):
        check_runtime("onnxruntime", "1.24.3", "1.24.4")


def test_a_version_that_is_none_is_one_line() -> None:
    with pytest.raises(SessionError, match=r"'iOS 18'.*export again"):
        check_runtime("onnxruntime", "1.29.0", "iOS 18")
