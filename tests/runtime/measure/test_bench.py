import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from shutil import copytree

import msgspec
import numpy as np
import pytest
from rich.console import Console

from gemma_runtime.bundle import MANIFEST, Bundle
from gemma_runtime.errors import BundleError, SessionError
from gemma_runtime.machine import (
    Machine,
    Memory,
    describe_machine,
    is_busy,
    measure_bandwidth,
    measure_memory,
    physical_cores,
)
from gemma_runtime.manifest import AttentionKind, LayerCache
from gemma_runtime.measure.bench import (
    Benchmark,
    BundleFigures,
    Samples,
    compare,
    count_bytes_per_token,
    fit_workload,
    measure,
    spread,
    summarize,
)
from gemma_runtime.measure.bench_table import render_benchmark
from gemma_runtime.measure.bench_worker import (
    ColdStart,
    Job,
    Part,
    PromptTime,
    Timings,
    WarmRun,
    Workload,
    artifact_files,
    measure_session,
    measure_token,
    measure_warm,
    random_tokens,
)
from gemma_runtime.session import FakeSession, Logits
from tests.runtime.manifests import ARTIFACT, make_manifest, write_bundle
from tests.runtime.real_bundles import export_random

WORKLOAD = Workload(threads=1, prompt_lengths=(4, 6, 8), decode_prompt=6, new_tokens=3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Bundle:
    return export_random(tmp_path_factory.mktemp("bench") / "export", tokenizer_path)


@pytest.mark.parametrize(
    ("context", "new_tokens", "lengths", "decode_prompt"),
    [
        (4096, 64, (32, 128, 512, 2048), 128),
        (2048, 64, (32, 128, 512, 2048), 128),
        (512, 64, (32, 128, 512), 128),
        (511, 64, (32, 128), 128),
        (150, 64, (32, 86, 128), 86),
        (16, 4, (12,), 12),
    ],
)
def test_prompts_are_limited_to_the_context(
    context: int, new_tokens: int, lengths: tuple[int, ...], decode_prompt: int
) -> None:
    workload = fit_workload(make_manifest(context_length=context), 2, new_tokens)

    assert workload == Workload(2, lengths, decode_prompt, new_tokens)


@pytest.mark.parametrize("new_tokens", [0, 128, 5000])
def test_more_new_tokens_than_the_context_holds_are_refused(new_tokens: int) -> None:
    with pytest.raises(SessionError, match="give 1 to 127"):
        fit_workload(make_manifest(context_length=128), 1, new_tokens)


def test_bytes_per_token_are_all_weights_and_the_visible_cache() -> None:
    manifest = make_manifest(
        context_length=512,
        layers=[
            LayerCache(AttentionKind.LOCAL, 16, 24, 2, 8),
            LayerCache(AttentionKind.GLOBAL, None, 512, 1, 8),
        ],
    )
    workload = Workload(1, (32,), decode_prompt=100, new_tokens=20)

    counted = count_bytes_per_token(manifest, workload)

    weights = 4096 * 4.5 / 8
    assert counted == weights + 2 * 2 * 8 * 16 * 4 + 2 * 8 * 110 * 4
    model = replace(manifest.model, looked_up=1024)
    untied = count_bytes_per_token(replace(manifest, model=model), workload)
    assert counted - untied == 1024 * 4.5 / 8


class _Recorder(FakeSession):
    """A session that records every call."""

    def __init__(self, context_length: int = 4096) -> None:
        super().__init__(
            lambda tokens: np.eye(16, dtype=np.float32)[len(tokens) % 16],
            context_length=context_length,
        )
        self.calls: list[tuple[str, int, int]] = []  # name, position before, tokens

    def prefill(self, tokens: Sequence[int]) -> Logits:
        self.calls.append(("prefill", self.position, len(tokens)))
        logits: Logits = super().score(tokens)[-1]
        return logits

    def decode(self, token: int) -> Logits:
        self.calls.append(("decode", self.position, token))
        logits: Logits = super().score([token])[-1]
        return logits


def test_each_prompt_starts_with_an_empty_cache_after_an_untimed_prompt() -> None:
    session = _Recorder()

    measure_session(session, 16, WORKLOAD)

    assert [call for call in session.calls if call[0] == "prefill"] == [
        ("prefill", 0, 8),
        ("prefill", 0, 4),
        ("prefill", 0, 6),
        ("prefill", 0, 8),
    ]


def test_new_tokens_follow_each_prompt_and_are_chosen_greedily() -> None:
    session = _Recorder()

    measure_session(session, 16, WORKLOAD)

    decoded = [call for call in session.calls if call[0] == "decode"]
    assert decoded == [
        ("decode", length + index, length + index) for length in (4, 6, 8) for index in range(3)
    ]


def test_nothing_is_decoded_after_a_prompt_that_leaves_no_room_for_it() -> None:
    timings = measure_session(_Recorder(context_length=10), 16, WORKLOAD)

    assert [(time.tokens, len(time.token_ms)) for time in timings.prompts] == [
        *((4, 3), (6, 3), (8, 0))
    ]


def test_times_are_read_around_each_step() -> None:
    ticks: Iterator[int] = count()

    timings = measure_session(_Recorder(), 16, WORKLOAD, clock=lambda: next(ticks) ** 2)

    # The clock reads 0 1 4, then pairs from 9 on; for each prompt that is nine times.
    assert timings.prompts == (
        PromptTime(4, 1e3, 4e3, (7e3, 11e3, 15e3)),
        PromptTime(6, 19e3, 40e3, (25e3, 29e3, 33e3)),
        PromptTime(8, 37e3, 76e3, (43e3, 47e3, 51e3)),
    )


def test_random_tokens_are_the_same_each_time_and_in_the_vocabulary() -> None:
    tokens = random_tokens(50, 400)

    assert tokens == random_tokens(50, 400)
    assert len(tokens) == 400
    assert set(tokens) <= set(range(50))
    assert len(set(tokens)) > 40


def test_artifact_files_are_those_without_a_role(tmp_path: Path, tokenizer_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", tokenizer=tokenizer_path)

    assert artifact_files(bundle) == [bundle.directory / ARTIFACT]


def test_figures_are_medians_over_the_repeats(tmp_path: Path) -> None:
    figures = summarize(_samples(tmp_path, [10.0, 40.0, 20.0]), bandwidth=1e6)

    assert figures.load_ms == spread([10.0, 40.0, 20.0])
    assert (figures.load_ms.median, figures.load_ms.low, figures.load_ms.high) == (20, 10, 40)
    assert figures.token_ms.median == 20
    assert figures.decode_tokens_per_second.median == pytest.approx(50)
    assert figures.token_p95_ms.median == pytest.approx(20)
    assert figures.prompts[0].tokens_per_second.median == pytest.approx(4 / 20e-3)
    assert figures.prompts[0].first_token_ms.median == 21
    assert figures.prompts[0].decode_tokens_per_second is None
    assert figures.prompts[1].decode_tokens_per_second == figures.decode_tokens_per_second
    assert figures.bandwidth_share == pytest.approx(50 * figures.bytes_per_token / 1e6)
    assert figures.artifact_bytes == 8
    assert set(figures.cache_bytes) == {"local", "global"}


def test_slow_tokens_change_the_95th_percentile_but_not_the_median(tmp_path: Path) -> None:
    samples = _samples(tmp_path, [10.0])
    times = (10.0,) * 18 + (100.0,) * 2
    (run,) = samples.warm
    slow = replace(run, timings=Timings((PromptTime(6, 10.0, 11.0, times),)))

    figures = summarize(replace(samples, warm=[slow]), bandwidth=1e6)

    assert figures.token_ms.median == 10
    assert figures.token_p95_ms.median == pytest.approx(100)


@pytest.mark.parametrize("missing", [1, 3])
def test_cold_times_are_left_out_if_one_repeat_has_none(tmp_path: Path, missing: int) -> None:
    """The median was over fewer repeats than the table said."""
    samples = _samples(tmp_path, [10.0, 20.0, 30.0])
    cold: list[ColdStart | None] = [None] * missing

    figures = summarize(replace(samples, cold=[*cold, *samples.cold[missing:]]), bandwidth=1e6)

    assert figures.load_cold_ms is None
    assert figures.first_token_cold_ms is None


def test_ratios_are_to_the_first_bundle(tmp_path: Path) -> None:
    slow, fast = (
        summarize(_samples(tmp_path / name, [ms]), bandwidth=1e6)
        for name, ms in (("slow", 40.0), ("fast", 10.0))
    )

    first, second = compare([slow, fast])

    assert set(first.ratios.values()) == {1.0}
    assert second.ratios["token_ms"] == pytest.approx(0.25)
    assert second.ratios["decode_tokens_per_second"] == pytest.approx(4)
    assert second.ratios["first_token_ms_4"] == pytest.approx(11 / 41)
    assert second.ratios["decode_tokens_per_second_6"] == pytest.approx(4)
    assert "decode_tokens_per_second_4" not in second.ratios


@pytest.mark.serial
def test_bundles_take_turns(bundle: Bundle) -> None:
    steps: list[str] = []

    benchmark = measure(
        [bundle.directory, bundle.directory],
        threads=1,
        repeats=2,
        new_tokens=2,
        on_progress=steps.append,
    )

    name = str(bundle.directory)
    assert steps == ["memory bandwidth", *[f"{name} 1/2"] * 2, *[f"{name} 2/2"] * 2]
    for figures in benchmark.bundles:
        assert 0 < figures.load_ms.low <= figures.load_ms.median <= figures.load_ms.high
        assert figures.peak_rss_bytes.low > figures.before_rss_bytes.low > 1 << 20
        room = bundle.manifest.context_length - 2
        assert [prompt.tokens for prompt in figures.prompts] == [32, room]
        assert all(prompt.decode_tokens_per_second for prompt in figures.prompts)
    assert benchmark.bundles[0].ratios["token_ms"] == 1
    assert msgspec.json.decode(msgspec.json.encode(benchmark), type=Benchmark) == benchmark


@pytest.mark.serial
def test_a_bundle_s_peak_memory_excludes_that_of_the_parent_process(bundle: Bundle) -> None:
    """getrusage reports the parent's peak for a child."""
    ballast = np.ones(400 << 17)  # 400 MiB, kept while the children run

    benchmark = measure([bundle.directory], threads=1, repeats=1, new_tokens=2)

    assert measure_memory().peak_bytes > ballast.nbytes
    assert benchmark.bundles[0].peak_rss_bytes.high < ballast.nbytes


def test_a_bundle_of_an_unknown_target_is_refused(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", target="toaster")

    with pytest.raises(SessionError, match="can't be measured: no backend runs target 'toaster'"):
        measure([bundle.directory], repeats=1, new_tokens=2)


def test_a_module_in_the_working_directory_does_not_replace_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m` searches the working directory first, so a numpy.py there was run."""
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    bundle = write_bundle(tmp_path / "bundle", target="toaster")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SessionError, match="no backend runs target 'toaster'"):
        measure([bundle.directory], repeats=1, new_tokens=2)


def test_a_folder_that_is_not_a_bundle_is_refused_before_anything_runs(tmp_path: Path) -> None:
    steps: list[str] = []

    with pytest.raises(BundleError):
        measure([write_bundle(tmp_path / "a").directory, tmp_path], on_progress=steps.append)

    assert steps == []


def test_a_job_survives_json() -> None:
    job = Job("bundle", WORKLOAD, Part.COLD)

    assert msgspec.json.decode(msgspec.json.encode(job), type=Job) == job


@pytest.mark.serial
def test_a_warm_run_measures_every_step(bundle: Bundle) -> None:
    run = measure_warm(bundle.directory, WORKLOAD)

    assert [prompt.tokens for prompt in run.timings.prompts] == [4, 6, 8]
    times = [time for prompt in run.timings.prompts for time in prompt.token_ms]
    assert len(times) == 9
    assert min(run.check_ms, run.load_ms, *times) > 0


@pytest.mark.serial
def test_touched_memory_is_what_was_read_not_what_is_held() -> None:
    """In a process of its own: a large one has threads and a collector that use its memory."""
    code = (
        "import numpy as np; from gemma_runtime.machine import measure_touched; "
        "held = np.ones(16 << 20, np.float32); "  # 64 MiB
        "print(measure_touched(lambda: held[: held.size // 2].sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if done.stdout.strip() == "None":
        pytest.skip("NOT TESTED: the system doesn't tell which pages were used")
    assert 32 << 20 <= int(done.stdout) < 40 << 20


@pytest.mark.serial
def test_a_new_token_touches_the_weights(bundle: Bundle) -> None:
    touched = measure_token(bundle, WORKLOAD)
    if touched is None:
        pytest.skip("NOT TESTED: the system doesn't tell which pages were used")
    assert touched > count_bytes_per_token(bundle.manifest, WORKLOAD)


def test_the_bandwidth_share_is_of_touched_bytes_where_they_are_told(tmp_path: Path) -> None:
    samples = _samples(tmp_path, [20.0])
    stored = summarize(samples, 1e6).bytes_per_token

    told = summarize(replace(samples, touched=2 * stored), 1e6)
    elsewhere = summarize(replace(samples, touched=stored // 3), 1e6)

    assert told.touched_bytes_per_token == 2 * stored
    assert told.bandwidth_share == pytest.approx(50 * 2 * stored / 1e6)
    assert elsewhere.touched_bytes_per_token is None  # the weights are in another process
    assert elsewhere.bandwidth_share == pytest.approx(50 * stored / 1e6)
    assert "not told" in rendered(_benchmark(elsewhere))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.serial
def test_bandwidth_is_plausible(threads: int) -> None:
    assert 1e6 < measure_bandwidth(threads, repeats=1, size=1 << 22) < 1e13


def test_a_machine_is_described_with_its_runtimes() -> None:
    machine = describe_machine(["onnxruntime", "numpy", "numpy"])

    assert machine.cpu
    assert 1 <= machine.physical_cores <= machine.logical_cores
    assert machine.runtimes["numpy"] == np.__version__
    assert list(machine.runtimes) == ["numpy", "onnxruntime"]


def test_a_runtime_that_is_not_installed_is_said_to_be_missing(tmp_path: Path) -> None:
    """It ended in a traceback, after all had been measured."""
    found = describe_machine(["no-such-runtime", "numpy"])
    figures = summarize(_samples(tmp_path, [10.0]), 1e6)

    assert found.runtimes == {"no-such-runtime": None, "numpy": np.__version__}
    text = rendered(replace(_benchmark(figures), machine=found))
    assert "no-such-runtime not installed" in text


@pytest.mark.parametrize("packages", [(), ("numpy", "no-such-runtime")])
@pytest.mark.serial
def test_a_benchmark_ends_whatever_packages_its_bundle_names(
    bundle: Bundle, tmp_path: Path, packages: tuple[str, ...]
) -> None:
    target = replace(bundle.manifest.target, packages=packages)
    folder = copytree(bundle.directory, tmp_path / "bundle")
    manifest = replace(bundle.manifest, target=target)
    (folder / MANIFEST).write_bytes(manifest.to_json())

    found = measure([folder], threads=1, repeats=1, new_tokens=2)

    assert found.machine.runtimes.keys() == set(packages)
    assert rendered(found)


def test_a_load_above_half_the_cores_is_busy() -> None:
    assert is_busy(0.51 * physical_cores())
    assert not is_busy(0.49 * physical_cores())


def test_the_table_shows_known_and_unknown_figures(tmp_path: Path) -> None:
    samples = _samples(tmp_path / "a", [10.0])
    first = summarize(replace(samples, cold=[None]), 1e6)
    second = replace(summarize(_samples(tmp_path / "[red]y", [20.0]), 1e6), prompts=())

    text = rendered(_benchmark(first, second))

    assert "unknown" in text
    assert "does not fit" in text
    assert "×2.00" in text
    assert "[red]y" in text
    assert "the machine was busy" in text
    assert "posix_fadvise" in text


def _samples(folder: Path, every_ms: list[float]) -> Samples:
    """One repeat per entry of `every_ms`; in it every step takes that long."""
    bundle = write_bundle(folder)
    memory = Memory(1 << 20, None, None)
    runs = [WarmRun(ms, ms, Timings(_prompts(ms)), memory, memory) for ms in every_ms]
    return Samples(bundle, WORKLOAD, [ColdStart(ms, ms * 2, 8) for ms in every_ms], runs)


def _prompts(ms: float) -> tuple[PromptTime, ...]:
    """After the first there is no room for new tokens."""
    return PromptTime(4, ms, ms + 1, ()), PromptTime(6, ms, ms + 1, (ms,) * 5)


def _benchmark(*bundles: BundleFigures) -> Benchmark:
    return Benchmark(
        machine=Machine("a CPU", 2, 4, 8 << 30, "a system", "3.11", {"onnxruntime": "1.29"}),
        threads=2,
        repeats=1,
        new_tokens=3,
        load_before=0.1,
        load_after=1.0,
        bandwidth_bytes_per_second=1e10,
        bundles=compare(bundles),
        warnings=("the machine was busy",),
    )


def rendered(benchmark: Benchmark) -> str:
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(render_benchmark(benchmark))
    return capture.get()
