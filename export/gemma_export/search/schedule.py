"""Where jobs run: in processes of this machine, or on a Ray cluster.

Both give `concurrent.futures` futures. The runs of one machine are not measured here: that is for
`run`, which does it while nothing else runs.
"""

import logging
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

from gemma_export.search.job import Failure, Job, run_job
from gemma_export.search.measures import Stage
from gemma_export.search.processes import Processes
from gemma_runtime.errors import MissingExtra, SearchError

_PATIENCE = 10.0  # seconds to wait for a cluster's port, and for its tasks to end
Outcome = dict[str, Failure | None]  # by cell


class Scheduler(Protocol):
    @property
    def is_alone(self) -> bool:
        """Whether it runs one group at a time, so that this machine is idle between them."""
        ...

    def submit(self, jobs: Sequence[Job], memory: int) -> Future[Outcome]:
        """Run jobs one after another, which take at most so many bytes of memory."""
        ...


def run_jobs(jobs: Sequence[Job], processes: Processes) -> Outcome:
    return {job.cell: run_job(job, processes) for job in jobs}


@contextmanager
def open_scheduler(workers: int, ray_address: str | None) -> Iterator[Scheduler]:
    """A scheduler, whose jobs end with the block. Raises SearchError for a missing cluster."""
    opened = _local(workers) if ray_address is None else _ray(ray_address)
    with opened as scheduler:
        yield scheduler


class _Local:
    """Each thread waits for one job, whose stages are processes."""

    def __init__(self, workers: int, processes: Processes) -> None:
        self._pool, self._processes = ThreadPoolExecutor(workers), processes
        self.is_alone = workers == 1

    def submit(self, jobs: Sequence[Job], memory: int) -> Future[Outcome]:
        return self._pool.submit(run_jobs, jobs, self._processes)

    def close(self) -> None:
        self._processes.stop()
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def _local(workers: int) -> Iterator[Scheduler]:
    scheduler = _Local(workers, Processes())
    try:
        yield scheduler
    finally:
        scheduler.close()


class _Ray:
    """Ray chooses the machine: one with a free core and enough memory for the export."""

    is_alone = False

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._function = ray.remote(_on_ray)
        self._references: list[Any] = []

    def submit(self, jobs: Sequence[Job], memory: int) -> Future[Outcome]:
        settings = {"num_cpus": 1, "memory": memory, "scheduling_strategy": "SPREAD"}
        reference = self._function.options(**settings, max_retries=0).remote(list(jobs))
        self._references.append(reference)
        future: Future[Outcome] = reference.future()
        return future

    def close(self) -> None:
        for reference in self._references:
            self._ray.cancel(reference)  # interrupts the task, which ends its processes
        if self._references:
            count = len(self._references)
            self._ray.wait(self._references, num_returns=count, timeout=_PATIENCE)
        self._ray.shutdown()


def _on_ray(jobs: list[Job]) -> Outcome:
    return run_jobs(jobs, Processes())


@contextmanager
def _ray(address: str) -> Iterator[Scheduler]:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingExtra("ray", "ray") from error
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SearchError(
            f"no Ray cluster at {address}: {reason}; start one with ray start --head, and give its "
            "address"
        ) from error
    scheduler = _Ray(ray)
    try:
        yield scheduler
    finally:
        scheduler.close()


def _knock(address: str) -> None:
    """Raise OSError or ValueError unless something listens there: Ray itself tries for minutes."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError("expected HOST:PORT, ray://HOST:PORT or auto")
    with socket.create_connection((host, int(port)), _PATIENCE):
        pass


def outcome_of(future: Future[Outcome], jobs: Sequence[Job]) -> Outcome:
    """What a group gave. A machine or process that was lost fails its cells, and only these."""
    try:
        return future.result()
    except Exception as error:  # Ray's and pickle's, of any kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return {job.cell: Failure(Stage.EXPORT, f"its worker was lost: {reason}") for job in jobs}
