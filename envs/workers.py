"""Worker processes of a stage."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor


def end_with_parent() -> None:
    """In a worker: end when the stage is killed, which else leaves workers waiting for work forever."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def worker_pool(num_workers: int) -> ProcessPoolExecutor:
    """Spawned, since a forked process would share this one's graphics context."""
    return ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), end_with_parent)
