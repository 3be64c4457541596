"""Work ahead of a consumer, in threads: bounded, and in order."""

import contextlib
import threading
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

PATIENCE = 10.0  # seconds for a source that is being waited for, as a camera, to give its next item

T = TypeVar("T")
R = TypeVar("R")


def ahead(
    items: Iterable[T],
    function: Callable[[T], R],
    workers: int,
    limit: int,
    cost: Callable[[T], int] = lambda item: 1,
) -> Generator[R, None, None]:
    """``map(function, items)``, computed by threads before it is asked for.

    The items are drawn by one thread, one after the other, so that they may come from a decoder. What
    `items` or `function` raise is raised in its place.

    Args:
        items: any number, even without end.
        function: runs in `workers` threads.
        workers: at least 1.
        limit: how much the results may cost that are there, or on their way, and were not taken yet; one may
            always be.
        cost: of the result of an item.

    Yields:
        The results, in the order of the items.

    Example:
        >>> list(ahead(range(5), lambda number: number**2, workers=2, limit=3))
        [0, 1, 4, 9, 16]
    """
    room = _Room(limit)
    results: SimpleQueue[tuple[Future[R], int] | None] = SimpleQueue()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ddrf_fast")
    drawing = threading.Lock()

    def draw() -> None:
        try:
            with drawing:
                for item in items if room.take(0) else ():
                    price = cost(item)
                    if not room.take(price):
                        break
                    results.put((pool.submit(function, item), price))
                    if not room.take(0):  # before another is drawn, which may be large, there is to be room
                        break
        except BaseException as error:
            failed: Future[R] = Future()
            failed.set_exception(error)
            results.put((failed, 0))
        finally:
            results.put(None)

    thread = threading.Thread(target=draw, name="ddrf_fast-draw", daemon=True)
    try:
        thread.start()
        while (entry := results.get()) is not None:
            result, price = entry
            value = result.result()
            room.give(price)
            yield value
    finally:
        room.close()
        pool.shutdown(cancel_futures=True)
        # What the items come from may be closed now: none may be drawn from here on. That takes a lock, for
        # a thread cannot be joined where an interrupt came after its start, and before it has begun.
        if drawing.acquire(timeout=PATIENCE):
            drawing.release()
            with contextlib.suppress(RuntimeError):
                thread.join()  # a thread that still runs when Python ends can abort it


class _Room:
    """Room for so much, of which threads take a part or wait."""

    def __init__(self, size: int) -> None:
        self._size, self._taken, self._closed = size, 0, False
        self._changed = threading.Condition()

    def take(self, part: int) -> bool:
        """Waits for room; whether there is still something to do."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or not self._taken or self._taken + max(part, 1) <= self._size
            )
            self._taken += part
            return not self._closed

    def give(self, part: int) -> None:
        with self._changed:
            self._taken -= part
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def grouped(items: Iterable[T], size: int, key: Callable[[T], Hashable]) -> Iterator[list[T]]:
    """Neighbours with one key, in groups of at most `size`. What came before an error comes before it.

    Example:
        >>> list(grouped("aaabca", 2, key=str))
        [['a', 'a'], ['a'], ['b'], ['c'], ['a']]
    """
    group: list[T] = []
    try:
        for item in items:
            if group and key(item) != key(group[0]):
                yield group
                group = []
            group.append(item)
            if len(group) == size:
                yield group
                group = []
    except Exception:
        if group:
            yield group
        raise
    if group:
        yield group
