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
    Order,
    PromptTime,
    Timings,
    WarmRun,
    Workload,
    artifact_files,
    measure_session,
    measure_warm,
    random_tokens,
)
from gemma_runtime.session import FakeSession, Logits
from tests.runtime.manifests import ARTIFACT, make_manifest, write_bundle
from tests.runtime.real_bundles import export_random

WORKLOAD = Workload(threads=1, prompt_lengths=(4, 8), decode_prompt=6, new_tokens=3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Bundle:
    return export_random(tmp_path_factory.mktemp("bench") / "export", tokenizer_path)


@pytest.mark.parametrize(
    ("context", "new_tokens", "lengths", "decode_prompt"),
    [
        (4096, 64, (32, 128, 512), 128),
        (512, 64, (32, 128, 512), 128),
        (511, 64, (32, 128), 128),
        (150, 64, (32, 128), 86),
        (16, 4, (16,), 12),
    ],
)
def test_prompts_are_those_that_fit(
    context: int, new_tokens: int, lengths: tuple[int, ...], decode_prompt: int
) -> None:
    found = fit_workload(make_manifest(context_length=context), 2, new_tokens)

    assert found == Workload(2, lengths, decode_prompt, new_tokens)


@pytest.mark.parametrize("new_tokens", [0, 128, 5000])
def test_more_new_tokens_than_the_context_holds_are_refused(new_tokens: int) -> None:
    with pytest.raises(SessionError, match="ask for 1 to 127"):
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

    found = count_bytes_per_token(manifest, workload)

    weights = 4096 * 4.5 / 8
    assert found == weights + 2 * 2 * 8 * 16 * 4 + 2 * 8 * 110 * 4


class _Recorder(FakeSession):
    """Notes every call."""

    def __init__(self) -> None:
        super().__init__(lambda tokens: np.eye(16, dtype=np.float32)[len(tokens) % 16])
        self.calls: list[tuple[str, int, int]] = []  # name, position before, tokens

    def prefill(self, tokens: Sequence[int]) -> Logits:
        self.calls.append(("prefill", self.position, len(tokens)))
        logits: Logits = super().score(tokens)[-1]
        return logits

    def decode(self, token: int) -> Logits:
        self.calls.append(("decode", self.position, token))
        logits: Logits = super().score([token])[-1]
        return logits


def test_each_prompt_starts_empty_after_one_untimed_round() -> None:
    session = _Recorder()

    measure_session(session, 16, WORKLOAD)

    assert session.calls[:4] == [
        ("prefill", 0, 8),
        ("prefill", 0, 4),
        ("prefill", 0, 8),
        ("prefill", 0, 6),
    ]


def test_new_tokens_are_the_likeliest_each_time() -> None:
    session = _Recorder()

    measure_session(session, 16, WORKLOAD)

    assert session.calls[4:] == [("decode", 6, 6), ("decode", 7, 7), ("decode", 8, 8)]


def test_times_are_read_around_each_step() -> None:
    ticks: Iterator[int] = count()

    found = measure_session(_Recorder(), 16, WORKLOAD, clock=lambda: next(ticks) ** 2)

    # Readings are 0 1 4, 9 16 25, then pairs from 36 on.
    assert found.prompts == (PromptTime(4, 1e3, 4e3), PromptTime(8, 7e3, 16e3))
    assert found.token_ms == (13e3, 17e3, 21e3)


def test_random_tokens_are_the_same_each_time_and_in_the_vocabulary() -> None:
    tokens = random_tokens(50, 400)

    assert tokens == random_tokens(50, 400)
    assert len(tokens) == 400
    assert set(tokens) <= set(range(50))
    assert len(set(tokens)) > 40


def test_artifact_files_leave_out_what_plays_a_role(tmp_path: Path, tokenizer_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", tokenizer=tokenizer_path)

    assert artifact_files(bundle) == [bundle.directory / ARTIFACT]


def test_figures_are_medians_over_the_repeats(tmp_path: Path) -> None:
    found = summarize(_samples(tmp_path, [10.0, 40.0, 20.0]), bandwidth=1e6)

    assert found.load_ms == spread([10.0, 40.0, 20.0])
    assert (found.load_ms.median, found.load_ms.low, found.load_ms.high) == (20, 10, 40)
    assert found.token_ms.median == 20
    assert found.decode_tokens_per_second.median == pytest.approx(50)
    assert found.token_p95_ms.median == pytest.approx(20)
    assert found.prompts[0].tokens_per_second.median == pytest.approx(4 / 20e-3)
    assert found.prompts[0].first_token_ms.median == 21
    assert found.bandwidth_share == pytest.approx(50 * found.bytes_per_token / 1e6)
    assert found.artifact_bytes == 8
    assert set(found.cache_bytes) == {"local", "global"}


def test_a_slow_token_shows_in_the_tail_and_not_in_the_median(tmp_path: Path) -> None:
    samples = _samples(tmp_path, [10.0])
    times = (10.0,) * 18 + (100.0,) * 2
    (run,) = samples.warm
    slow = replace(run, timings=Timings(run.timings.prompts, times))

    found = summarize(replace(samples, warm=[slow]), bandwidth=1e6)

    assert found.token_ms.median == 10
    assert found.token_p95_ms.median == pytest.approx(100)


@pytest.mark.parametrize("missing", [1, 3])
def test_a_cold_time_that_is_missing_even_once_is_left_out(tmp_path: Path, missing: int) -> None:
    """It was a median over fewer repeats than the table says."""
    samples = _samples(tmp_path, [10.0, 20.0, 30.0])
    cold: list[ColdStart | None] = [None] * missing

    found = summarize(replace(samples, cold=[*cold, *samples.cold[missing:]]), bandwidth=1e6)

    assert found.load_cold_ms is None
    assert found.first_token_cold_ms is None


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


def test_bundles_take_turns(bundle: Bundle) -> None:
    steps: list[str] = []

    found = measure(
        [bundle.directory, bundle.directory],
        threads=1,
        repeats=2,
        new_tokens=2,
        on_progress=steps.append,
    )

    name = str(bundle.directory)
    assert steps == ["memory bandwidth", *[f"{name} 1/2"] * 2, *[f"{name} 2/2"] * 2]
    for figures in found.bundles:
        assert 0 < figures.load_ms.low <= figures.load_ms.median <= figures.load_ms.high
        assert figures.peak_rss_bytes.low > figures.before_rss_bytes.low > 1 << 20
        assert [prompt.tokens for prompt in figures.prompts] == [32]
    assert found.bundles[0].ratios["token_ms"] == 1
    assert msgspec.json.decode(msgspec.json.encode(found), type=Benchmark) == found


def test_memory_is_the_bundles_own(bundle: Bundle) -> None:
    """A child inherits its parent's peak where the system counts it by getrusage."""
    ballast = np.ones(400 << 17)  # 400 MiB, held while the children run

    found = measure([bundle.directory], threads=1, repeats=1, new_tokens=2)

    assert measure_memory().peak_bytes > ballast.nbytes
    assert found.bundles[0].peak_rss_bytes.high < ballast.nbytes


def test_a_bundle_nothing_here_can_run_is_refused(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", target="toaster")

    with pytest.raises(SessionError, match="can't be measured: no backend runs target 'toaster'"):
        measure([bundle.directory], repeats=1, new_tokens=2)


def test_a_module_in_the_users_folder_is_not_taken_for_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m` looks into the working directory first: its numpy.py was run."""
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    bundle = write_bundle(tmp_path / "bundle", target="toaster")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SessionError, match="no backend runs target 'toaster'"):
        measure([bundle.directory], repeats=1, new_tokens=2)


def test_a_folder_that_is_no_bundle_is_refused_before_anything_runs(tmp_path: Path) -> None:
    steps: list[str] = []

    with pytest.raises(BundleError):
        measure([write_bundle(tmp_path / "a").directory, tmp_path], on_progress=steps.append)

    assert steps == []


def test_an_order_survives_the_way_to_the_worker() -> None:
    order = Order("bundle", WORKLOAD, cold=True)

    assert msgspec.json.decode(msgspec.json.encode(order), type=Order) == order


def test_a_warm_run_in_this_process_measures_every_step(bundle: Bundle) -> None:
    found = measure_warm(bundle.directory, WORKLOAD)

    assert [prompt.tokens for prompt in found.timings.prompts] == [4, 8]
    assert len(found.timings.token_ms) == 3
    assert min(found.check_ms, found.load_ms, *found.timings.token_ms) > 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bandwidth_is_that_of_a_memory(threads: int) -> None:
    assert 1e8 < measure_bandwidth(threads, repeats=1, size=1 << 22) < 1e13


def test_a_machine_is_described_with_its_runtimes() -> None:
    found = describe_machine(["onnxruntime", "numpy", "numpy"])

    assert found.cpu
    assert 1 <= found.physical_cores <= found.logical_cores
    assert found.runtimes["numpy"] == np.__version__
    assert list(found.runtimes) == ["numpy", "onnxruntime"]


def test_a_runtime_that_is_not_installed_is_said_to_be_missing(tmp_path: Path) -> None:
    """It ended in a traceback, after all had been measured."""
    found = describe_machine(["no-such-runtime", "numpy"])
    figures = summarize(_samples(tmp_path, [10.0]), 1e6)

    assert found.runtimes == {"no-such-runtime": None, "numpy": np.__version__}
    text = rendered(replace(_benchmark(figures), machine=found))
    assert "no-such-runtime not installed" in text


@pytest.mark.parametrize("packages", [(), ("numpy", "no-such-runtime")])
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


def test_the_table_shows_what_is_and_what_is_not_known(tmp_path: Path) -> None:
    samples = _samples(tmp_path / "a", [10.0])
    first = summarize(replace(samples, cold=[None]), 1e6)
    second = replace(summarize(_samples(tmp_path / "[red]y", [20.0]), 1e6), prompts=())

    text = rendered(_benchmark(first, second))

    assert "not known" in text
    assert "does not fit" in text
    assert "×2.00" in text
    assert "[red]y" in text
    assert "the machine was busy" in text
    assert "posix_fadvise" in text


def _samples(folder: Path, every_ms: list[float]) -> Samples:
    """Repeats in which each step took as long as the list says."""
    bundle = write_bundle(folder)
    memory = Memory(1 << 20, None, None)
    runs = [
        WarmRun(ms, ms, Timings((PromptTime(4, ms, ms + 1),), (ms,) * 5), memory, memory)
        for ms in every_ms
    ]
    return Samples(bundle, WORKLOAD, [ColdStart(ms, ms * 2, 8) for ms in every_ms], runs)


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
