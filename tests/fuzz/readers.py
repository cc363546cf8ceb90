"""Every reader of untrusted bytes, by name."""

from collections.abc import Mapping

from tests.fuzz.bundle_readers import BUNDLE_READERS
from tests.fuzz.checkpoint_readers import CHECKPOINT_READERS
from tests.fuzz.reader import Reader
from tests.fuzz.text_readers import TEXT_READERS

READERS: Mapping[str, Reader] = {**CHECKPOINT_READERS, **BUNDLE_READERS, **TEXT_READERS}
