"""A folder in which the campaign's commands run, and their results as digests."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from gemma_runtime.bundle import MANIFEST, open_bundle, sha256_file


@dataclass(frozen=True, slots=True)
class Workplace:
    """Inputs that stay, and below `work` what commands write: a result and a cache."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "inputs/model"

    @property
    def text(self) -> Path:
        """A file for calibration."""
        return self.folder / "inputs/text.txt"

    @property
    def opening(self) -> Path:
        """A file with the text to bake."""
        return self.folder / "inputs/opening.txt"

    @property
    def bundle(self) -> Path:
        """A finished bundle that runtime commands work on."""
        return self.folder / "inputs/bundle"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def result(self) -> Path:
        return self.work / "out/result"

    @property
    def cache(self) -> Path:
        return self.work / "cache"

    def clear(self, cache: bool) -> None:
        """Remove results, and the cache if asked."""
        shutil.rmtree(self.result.parent, ignore_errors=True)
        self.result.parent.mkdir(parents=True)
        if cache:
            shutil.rmtree(self.cache, ignore_errors=True)

    def leftovers(self) -> list[str]:
        """Files of unfinished work, which a later command removes or goes on with."""
        return sorted(
            path.relative_to(self.work).as_posix()
            for path in self.work.rglob("*")
            if ".partial-" in path.name or ".old-" in path.name
        )


def bundle_digest(folder: Path) -> str | None:
    """Of what a bundle's files hold; None without a bundle. Raises if any file is damaged."""
    if not folder.exists():
        return None
    files = open_bundle(folder).manifest.files
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    listed = {name: file.sha256 for name, file in files.items()}
    listed["codes"] = manifest["quantization"]["codes_digest"]
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str | None:
    return sha256_file(path) if path.exists() else None


def make_workplace(folder: Path) -> Workplace:
    """Write the inputs: a tiny Gemma 2, a text, and a finished bundle.

    In a process of its own: torch's threads must not run where commands are forked.
    """
    subprocess.run([sys.executable, "-m", __name__, folder], check=True, stderr=subprocess.DEVNULL)
    return Workplace(folder)


def _write_inputs(at: Workplace) -> None:
    from tests.data.tiny_bundle import build, save_checkpoint

    save_checkpoint(at.checkpoint)
    config = at.checkpoint / "config.json"
    settings = json.loads(config.read_text("utf-8"))
    settings["query_pre_attn_scalar"] = settings["head_dim"]  # llama.cpp has no other
    config.write_text(json.dumps(settings), "utf-8")
    at.text.write_text(" ".join(f"word{number} and again" for number in range(400)), "utf-8")
    at.opening.write_text("once upon a time", "utf-8")
    build(at.bundle)


if __name__ == "__main__":
    _write_inputs(Workplace(Path(sys.argv[1])))
