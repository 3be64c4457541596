"""Does the jobs: reads ahead, computes, writes behind, and carries on where an image fails."""

import errno
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from ddrf_fast.batch.plan import Job
from ddrf_fast.data import ALPHA_SUFFIXES, count_pixels, read_profile, write_image
from ddrf_fast.inference.streaming import ahead, grouped

SMALL = 2**22  # pixels; of images that have more, fewer are held at a time

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Work(Protocol):
    """What is done with images, as a :class:`~ddrf_fast.inference.Session` does it."""

    def compute(self, requests: Sequence[Any], /) -> list[Any]: ...
    def finish(self, request: Any, output: Any, /) -> np.ndarray: ...


def write_output(job: Job, request: Any, image: np.ndarray) -> None:
    """Writes a result, with the colour profile of the first input; of formats without alpha, without it."""
    if image.shape[2:] in ((2,), (4,)) and job.output.suffix.lower() not in ALPHA_SUFFIXES:
        image = image[:, :, :3] if image.shape[2] == 4 else image[:, :, 0]
    job.output.parent.mkdir(parents=True, exist_ok=True)
    write_image(job.output, image, read_profile(job.inputs[0]))


@dataclass
class Report:
    """What came of some jobs.

    Attributes:
        written: the jobs whose outputs were.
        skipped: those whose outputs were there.
        failures: those that failed, and why.
        stopped: why the others were not begun; empty where all were.
        mapped: the lowest and highest values that became black and white, where thermal values were mapped.
        narrow: (job, (lowest, highest value)) of the thermal images that use little of their 16 bit.
    """

    written: list[Job] = field(default_factory=list)
    skipped: list[Job] = field(default_factory=list)
    failures: list[tuple[Job, Exception]] = field(default_factory=list)
    stopped: str = ""
    mapped: tuple[float, float] | None = None
    narrow: list[tuple[Job, tuple[int, int]]] = field(default_factory=list)


@dataclass
class _Prepared:
    job: Job
    request: Any = None
    error: Exception | None = None

    @property
    def key(self) -> object:
        return self.request.key if self.error is None else id(self)


def run(
    jobs: Sequence[Job],
    work: Work,
    prepare: Callable[[Job], Any],
    *,
    verb: str,
    write: Callable[[Job, Any, np.ndarray], None] = write_output,
    skip_existing: bool = False,
    stop_at_failure: bool = False,
    batch_size: int = 1,
    workers: int = 2,
    progress: bool = True,
) -> Report:
    """Does the jobs, with a progress bar on stderr where that is a terminal.

    Reading and writing go on in threads while the network computes; a few images are held, however many
    there are. When it is interrupted, what has been computed is written first.

    Args:
        jobs: of :func:`~ddrf_fast.batch.plan`.
        work: the session.
        prepare: makes a request for it of a job; runs in the reading threads.
        verb: for the progress bar.
        write: writes the result of a job and its request; runs in the writing threads.
        skip_existing: leave outputs that are there as they are; otherwise they are replaced.
        stop_at_failure: raise what one job raises, instead of noting it and going on.
        batch_size: how many neighbours of one size are computed together.
        workers: threads that read, and as many that write.
        progress: show the bar.

    Returns:
        What was written, skipped, and failed. A full disk stops all.

    Raises:
        KeyboardInterrupt: it was interrupted; the message says how far it came.
    """
    report = Report(skipped=[job for job in jobs if skip_existing and job.output.exists()])
    skipped = set(report.skipped)
    waiting = [job for job in jobs if job not in skipped]

    def attempt(job: Job) -> _Prepared:
        try:
            return _Prepared(job, prepare(job))
        except Exception as error:
            return _Prepared(job, error=error)

    def finish(item: _Prepared, output: Any) -> None:
        write(item.job, item.request, work.finish(item.request, output))
        report.written.append(item.job)  # here: an interrupt may come anywhere in the main thread

    hidden = None if progress and len(jobs) > 1 else True
    bar = tqdm(total=len(waiting), desc=verb, unit="image", file=sys.stderr, disable=hidden)
    writes: deque[tuple[Job, Future[None]]] = deque()

    def fail(job: Job, error: Exception) -> None:
        if stop_at_failure:
            raise error
        report.failures.append((job, error))
        bar.update()

    def collect(most: int) -> None:
        while sum(_cost(job) for job, _ in writes) > most:
            job, future = writes.popleft()
            error = future.exception()
            if isinstance(error, Exception):
                fail(job, error)
            else:
                bar.update()
            if isinstance(error, OSError) and error.errno in _FULL:
                report.stopped = os.strerror(error.errno)

    prepared = ahead(waiting, attempt, workers, workers + batch_size, _cost)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ddrf_fast-write")
    try:
        for group in grouped(prepared, batch_size, key=lambda item: item.key):
            for item, output in _computed(group, work):
                if isinstance(output, Exception):
                    fail(item.job, output)
                    continue
                _note(report, item)
                writes.append((item.job, pool.submit(finish, item, output)))
            collect(2 * workers)
            if report.stopped:
                break
        collect(0)
    except KeyboardInterrupt:
        pool.shutdown()  # when all has been written that was computed
        raise KeyboardInterrupt(f"after {len(report.written)} of {len(waiting)}") from None
    finally:
        prepared.close()
        pool.shutdown()
        bar.close()
    return report


@lru_cache(maxsize=256)
def _cost(job: Job) -> int:
    """How much of what may be held it takes: 1, of large images more."""
    return max([count_pixels(path) // SMALL for path in job.inputs] + [1])


def _computed(group: Sequence[_Prepared], work: Work) -> Iterator[tuple[_Prepared, Any]]:
    """Each of a group with its output, or with the error that it alone is to blame for."""
    if group[0].error is not None:
        yield from ((item, item.error) for item in group)
        return
    try:
        outputs = work.compute([item.request for item in group])
    except Exception as error:
        if len(group) == 1:
            yield group[0], error
        else:
            for item in group:
                yield from _computed([item], work)
        return
    yield from zip(group, outputs, strict=True)


def _note(report: Report, item: _Prepared) -> None:
    """What there is to tell of thermal values."""
    mapped, narrow = getattr(item.request, "mapped", None), getattr(item.request, "narrow", None)
    if mapped:
        low, high = report.mapped or mapped
        report.mapped = min(low, mapped[0]), max(high, mapped[1])
    if narrow:
        report.narrow.append((item.job, narrow))
