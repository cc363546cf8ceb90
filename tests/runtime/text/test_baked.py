"""Baked prefixes of a tiny bundle: exact where they fit, refused by name where they don't."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma_runtime import snapshot_file
from gemma_runtime.bundle import Bundle, open_bundle
from gemma_runtime.errors import BakedError, ContextFull
from gemma_runtime.session import Session, open_session
from gemma_runtime.snapshot import Snapshot
from gemma_runtime.text.baked import Baking, bake, open_baked
from gemma_runtime.text.chat import Message
from gemma_runtime.text.conversation import Conversation
from gemma_runtime.text.frame import CANONICAL_TEMPLATE
from gemma_runtime.text.opening import Opening
from gemma_runtime.text.tokenizer import Tokenizer, load_tokenizer
from tests.runtime.real_bundles import export_random

CHAT = Opening(
    system="the user is in the thing " * 8,
    examples=(Message("user", "the in"), Message("assistant", "us er")),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Bundle:
    folder = tmp_path_factory.mktemp("baked") / "export"
    return export_random(folder, tokenizer_path, context_length=256, recipe="int8")


@pytest.fixture(scope="module")
def session(bundle: Bundle) -> Iterator[Session]:
    with open_session(bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def file(bundle: Bundle, session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "chat.safetensors"
    bake_file(bundle, session, CHAT, path)
    return path


def bake_file(bundle: Bundle, session: Session, opening: Opening, path: Path) -> Baking:
    return bake(bundle, session, load_tokenizer(bundle), opening, path)


def talk(bundle: Bundle, session: Session, **settings: object) -> Conversation:
    manifest = bundle.manifest
    return Conversation(
        session,
        load_tokenizer(bundle),
        template=manifest.chat_template,
        bos_token=manifest.bos_token,
        eos_token=manifest.eos_token,
        stop_tokens=manifest.stop_tokens,
        **settings,  # type: ignore[arg-type]
    )


def test_a_session_starts_from_the_file_as_if_it_had_fed_the_prefix(
    bundle: Bundle, session: Session, file: Path
) -> None:
    baked = open_baked(file, bundle)
    tokens = list(baked.snapshot.tokens)
    assert len(tokens) > 65 + 16  # further than the caches of local layers hold
    with open_session(bundle, threads=1) as fed:
        fed.prefill(tokens)
        session.resume(baked.snapshot)
        assert session.tokens == tokens
        for token in (5, 7, 11):
            assert np.array_equal(session.decode(token), fed.decode(token))


def test_what_was_baked_is_read_back(bundle: Bundle, file: Path) -> None:
    assert open_baked(file, bundle).opening == CHAT


def test_a_chat_feeds_only_what_follows_the_prefix(
    bundle: Bundle, session: Session, file: Path
) -> None:
    baked = open_baked(file, bundle)
    chat = talk(bundle, session, baked=baked)
    assert session.position == len(baked.snapshot.tokens)
    first = chat.send("us", max_new_tokens=4)
    texts = ["".join(first)]
    plain = talk(bundle, session, system=CHAT.system, examples=CHAT.examples)
    list(whole := plain.send("us", max_new_tokens=4))
    assert first.result.prompt_tokens < 12
    total = first.result.prompt_tokens + len(baked.snapshot.tokens)
    assert whole.result.prompt_tokens == total
    assert chat.messages[:3] == [Message("system", CHAT.system or ""), *CHAT.examples]
    chat.reset()
    assert session.position == len(baked.snapshot.tokens)
    texts.append("".join(chat.send("us", max_new_tokens=4)))
    assert texts[0] == texts[1]


def test_a_chat_that_rolls_keeps_the_prefix(bundle: Bundle, session: Session, file: Path) -> None:
    baked = open_baked(file, bundle)
    chat = talk(bundle, session, baked=baked, roll=True)
    for _ in range(8):
        list(chat.send("the user in us", max_new_tokens=8))
        assert session.tokens[: len(baked.snapshot.tokens)] == list(baked.snapshot.tokens)
    assert chat.forgotten > 0
    assert chat.messages[1:3] == list(CHAT.examples)


def test_a_prompt_that_begins_otherwise_is_refused(bundle: Bundle, file: Path) -> None:
    baked = open_baked(file, bundle)
    tokens = list(baked.snapshot.tokens)
    baked.check_begins([*tokens, 5])
    with pytest.raises(BakedError, match=rf"another from token 4 on, of the {len(tokens)} in .*f"):
        baked.check_begins([*tokens[:3], 399, *tokens[4:], 5])
    with pytest.raises(BakedError, match=f"another from token {len(tokens)} on"):
        baked.check_begins(tokens[:-1])
    with pytest.raises(BakedError, match="prompt ends with"):
        baked.check_begins(tokens)


def test_a_chat_whose_template_now_writes_something_else_is_refused(
    bundle: Bundle, session: Session, file: Path
) -> None:
    """A template can write the date, for example."""
    chat = talk(bundle, session, baked=open_baked(file, bundle))
    chat._template = CANONICAL_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}Tuesday")
    with pytest.raises(BakedError, match="the prompt is another from token"):
        chat.send("us")


@pytest.mark.parametrize(
    "given", [{"system": "er"}, {"examples": CHAT.examples}, {"tools": [{"name": "ring"}]}]
)
def test_a_chat_gets_its_beginning_from_one_place(
    bundle: Bundle, session: Session, file: Path, given: dict[str, object]
) -> None:
    with pytest.raises(BakedError, match=r"has the system turn, examples and tools .* give none"):
        talk(bundle, session, baked=open_baked(file, bundle), **given)


def test_a_text_does_not_begin_a_chat(bundle: Bundle, session: Session, tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    bake_file(bundle, session, Opening(text="the user in the thing"), path)
    with pytest.raises(BakedError, match="is a text for prompts"):
        talk(bundle, session, baked=open_baked(path, bundle))


def test_a_file_is_replaced_only_on_demand(
    bundle: Bundle, session: Session, tmp_path: Path
) -> None:
    path = tmp_path / "text.safetensors"
    bake_file(bundle, session, Opening(text="the user"), path)
    before = path.read_bytes()
    with pytest.raises(BakedError, match="exists; give another file, or --force"):
        bake_file(bundle, session, Opening(text="in the thing"), path)
    assert path.read_bytes() == before
    tokenizer: Tokenizer = load_tokenizer(bundle)
    bake(bundle, session, tokenizer, Opening(text="in the thing"), path, force=True)
    assert open_baked(path, bundle).opening.text == "in the thing"
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_the_same_prefix_gives_the_same_file(
    bundle: Bundle, session: Session, file: Path, tmp_path: Path
) -> None:
    again = tmp_path / file.name
    bake_file(bundle, session, CHAT, again)
    assert again.read_bytes() == file.read_bytes()


def test_a_prefix_that_fills_the_context_is_refused(
    bundle: Bundle, session: Session, tmp_path: Path
) -> None:
    path = tmp_path / "long.safetensors"
    with pytest.raises(ContextFull):
        bake_file(bundle, session, Opening(text="the user in " * 200), path)
    with pytest.raises(BakedError, match="nothing to bake"):
        bake_file(bundle, session, Opening(), path)
    assert not path.exists()


def test_a_folder_that_can_not_be_written_is_one_line(
    bundle: Bundle, session: Session, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BakedError, match=r"can't write .*file/x"):
        bake_file(bundle, session, Opening(text="the user"), tmp_path / "file" / "x")


def test_a_file_of_other_weights_is_refused(
    bundle: Bundle, file: Path, tmp_path: Path, tokenizer_path: Path
) -> None:
    other = export_random(tmp_path / "other", tokenizer_path, context_length=256, seed=8)
    with pytest.raises(BakedError, match=r"of another bundle \(random:7 int8 for onnx.*bake it"):
        open_baked(file, other)


def test_a_file_in_the_bundle_s_folder_leaves_the_bundle_as_it_is(
    bundle: Bundle, file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(bundle.directory, folder)
    shutil.copy(file, folder / "chat.safetensors")
    opened = open_bundle(folder)
    assert opened.digest() == bundle.digest()
    assert open_baked(folder / "chat.safetensors", opened).opening == CHAT


@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("package_version", lambda name: "9.9", r"with gemma-export .*, here is 9\.9"),
        ("processor_name", lambda: "Z80", "here is .* Z80"),
        ("processor_features", lambda: ["avx9"], "or their instruction sets differ"),
    ],
)
def test_a_file_made_elsewhere_is_refused(
    bundle: Bundle,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    found: object,
    message: str,
) -> None:
    monkeypatch.setattr(snapshot_file, name, found)
    with pytest.raises(BakedError, match=rf"chat\.safetensors was made .*{message}.*; bake it"):
        open_baked(file, bundle)


def test_a_changed_byte_anywhere_is_noticed(
    bundle: Bundle, session: Session, file: Path, tmp_path: Path
) -> None:
    content = file.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    for at in [*range(length, len(content), (len(content) - length) // 40), len(content) - 1]:
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        session.reset()
        with pytest.raises(BakedError, match=r"was altered: .* another sha256; bake it again"):
            session.resume(open_baked(broken, bundle).snapshot)
        assert session.position == 0


@pytest.mark.parametrize("keep", [0, 7, 8, 200, 4000, -1])
def test_a_file_cut_short_is_refused(bundle: Bundle, file: Path, tmp_path: Path, keep: int) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BakedError, match=r"broken\.safetensors .*; bake it again"):
        open_baked(broken, bundle)


def with_metadata(file: Path, change: dict[str, object], to: Path) -> Path:
    """A copy whose header says something else."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for key, value in change.items():
        about = json.loads(header["__metadata__"]["snapshot"])
        if key in about:
            header["__metadata__"]["snapshot"] = json.dumps({**about, key: value})
        elif value is None:
            header["__metadata__"].pop(key)
        else:
            header["__metadata__"][key] = value
    text = json.dumps(header).encode()
    to.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return to


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"snapshot": None}, "is not a baked prefix; expected a file of gemma-runtime bake"),
        ({"snapshot": "[]"}, "is not a baked prefix: Expected `object`"),
        ({"format": 2}, "has format 2, expected 1; bake it again"),
        ({"maker": {}}, "is not a baked prefix: .*missing required field"),
        ({"digests": {}}, "other tensors than it says"),
        ({"opening": None}, "doesn't say what was baked"),
        ({"opening": '{"tools": [{}]}'}, "doesn't say what was baked: tool 1 has no name"),
        ({"opening": '{"examples": [{"role": "user", "content": ""}]}'}, "doesn't say what"),
    ],
)
def test_a_header_that_says_something_else_is_refused(
    bundle: Bundle, file: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    broken = with_metadata(file, change, tmp_path / "broken.safetensors")
    with pytest.raises(BakedError, match=message):
        open_baked(broken, bundle)


def test_a_file_that_vanishes_after_it_was_opened_is_one_line(
    bundle: Bundle, session: Session, file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.safetensors"
    shutil.copy(file, copy)
    baked = open_baked(copy, bundle)
    copy.unlink()
    with pytest.raises(BakedError, match=r"can't read .*copy\.safetensors: No such file"):
        session.resume(baked.snapshot)
    assert session.position == 0


def test_a_backend_that_gives_other_logits_from_the_file_leaves_none(
    bundle: Bundle, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = session.resume

    def wrong(snapshot: Snapshot) -> None:
        zeros = {name: np.zeros_like(array) for name, array in snapshot.caches.items()}
        right(replace(snapshot, caches=zeros))

    monkeypatch.setattr(session, "resume", wrong)
    path = tmp_path / "wrong.safetensors"
    with pytest.raises(BakedError, match="gave other logits"):
        bake_file(bundle, session, Opening(text="the user in the thing"), path)
    assert not path.exists()
