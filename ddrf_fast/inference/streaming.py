"""Work ahead of a consumer, in threads: bounded, and in order."""

import itertools
import threading
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(
    items: Iterable[T], function: Callable[[T], R], workers: int, limit: int
) -> Generator[R, None, None]:
    """``map(function, items)``, computed by threads before it is asked for.

    The items are drawn by one thread, one after the other, so that they may come from a decoder. What
    `items` or `function` raise is raised in its place.

    Args:
        items: any number, even without end.
        function: runs in `workers` threads.
        workers: at least 1.
        limit: how many results may be there, or on their way, that were not taken yet.

    Yields:
        The results, in the order of the items.

    Example:
        >>> list(ahead(range(5), lambda number: number**2, workers=2, limit=3))
        [0, 1, 4, 9, 16]
    """
    free = threading.Semaphore(limit)
    stopped = threading.Event()
    results: SimpleQueue[Future[R] | None] = SimpleQueue()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ddrf_fast")

    def draw() -> None:
        iterator = iter(items)
        try:
            while True:
                free.acquire()
                if stopped.is_set():
                    break
                try:
                    item = next(iterator)
                except StopIteration:
                    break
                results.put(pool.submit(function, item))
        except BaseException as error:
            failed: Future[R] = Future()
            failed.set_exception(error)
            results.put(failed)
        finally:
            results.put(None)

    threading.Thread(target=draw, name="ddrf_fast-draw", daemon=True).start()
    try:
        while (result := results.get()) is not None:
            value = result.result()
            free.release()
            yield value
    finally:
        stopped.set()
        free.release()
        pool.shutdown(cancel_futures=True)


def grouped(items: Iterable[T], size: int, key: Callable[[T], Hashable]) -> Iterator[list[T]]:
    """Neighbours with one key, in groups of at most `size`.

    Example:
        >>> list(grouped("aaabca", 2, key=str))
        [['a', 'a'], ['a'], ['b'], ['c'], ['a']]
    """
    for _, alike in itertools.groupby(items, key):
        while group := list(itertools.islice(alike, size)):
            yield group
