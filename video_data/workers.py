"""Many calls on a few worker processes, with results in order, that outlive a worker's crash."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain

# Calls waiting per worker: enough that none idles, few enough that little is lost with a crash.
CALLS_AHEAD = 8


def call_in_order(function: Callable, calls: Iterable[tuple], num_workers: int) -> Generator:
    """Yield function(*call) for every call, in order; None for a call that kills its process.

    Native decoders can crash on damaged files. Then the pool is gone with all that ran in it, so the calls still
    waiting get a new pool, after the first of them has been tried alone.
    """
    waiting = iter(calls)
    while True:
        unfinished: deque[tuple] = deque()
        pool = _pool(num_workers)
        try:
            yield from _call_until_crash(pool, function, waiting, num_workers * CALLS_AHEAD, unfinished)
            return
        except BrokenProcessPool:
            pass
        finally:
            pool.shutdown(cancel_futures=True)
        yield call_alone(function, unfinished.popleft())
        waiting = chain(unfinished, waiting)


def _call_until_crash(
    pool: ProcessPoolExecutor, function: Callable, calls: Iterator[tuple], num_ahead: int, unfinished: deque[tuple]
) -> Iterator:
    """Yield results in order; `unfinished` holds the calls drawn and not yet answered, also after a crash."""
    futures: deque = deque()
    while True:
        while len(unfinished) < num_ahead and (call := next(calls, None)) is not None:
            unfinished.append(call)
            futures.append(pool.submit(function, *call))
        if not unfinished:
            return
        result = futures.popleft().result()
        unfinished.popleft()
        yield result


def call_alone(function: Callable, call: tuple):
    """function(*call) in a process of its own; None where the call kills it."""
    pool = _pool(1)
    try:
        return pool.submit(function, *call).result()
    except BrokenProcessPool:
        return None
    finally:
        pool.shutdown()


def _pool(num_workers: int) -> ProcessPoolExecutor:
    # Spawned, because forking a process in which torch or a decoder has threads can hang.
    return ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _start_worker)


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal; only the parent shall answer it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is killed: the workers of a pool would wait for it forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
