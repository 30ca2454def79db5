"""One operator over many calls, with results in the order of the calls: on this machine or on a Ray cluster.

What is computed does not depend on who computes it, so both write the same bytes.
"""

import json
import logging
import os
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any

from video_data.workers import call_alone, call_in_order

RUNNERS = ("local", "ray")
# Calls in one task of Ray: enough that starting it costs little, few enough to spread over the nodes.
CALLS_A_TASK = 16
OBJECT_STORE_BYTES = 256 << 20  # results are rows of text: frames go to files


def run_in_order(runner: str, function: Callable, calls: list[tuple], num_workers: int) -> Generator:
    """Yield function(*call) for every call, in order; None for a call that kills its process.

    What the function returns must be JSON. Raises ValueError for an unknown runner or where Ray is missing.
    """
    if runner == "local":
        yield from call_in_order(function, calls, num_workers)
    elif runner == "ray":
        yield from _run_on_ray(function, calls, num_workers)
    else:
        raise ValueError(f"runner is {runner!r}, expected one of {RUNNERS}")


def _run_on_ray(function: Callable, calls: list[tuple], num_workers: int) -> Iterator:
    """Ray Data's streaming executor; tasks that it lost to a crash are done here, each call alone."""
    try:
        import ray
    except ImportError:
        raise ValueError("runner=ray needs Ray: pip install 'lerobot_policy_lapa[ray]'") from None
    if not calls:
        return
    # It warns that calls are no columns of Arrow's, which they need not be.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    started_here = not ray.is_initialized()
    if started_here:
        # On a cluster RAY_ADDRESS names its head; else this machine is one, with as many workers as asked for.
        ray.init(include_dashboard=False, configure_logging=False, log_to_driver=False, **_resources(num_workers))
    try:
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        # A decoder that crashes on a file does so every time: one failure is enough, and costs one task.
        context.max_errored_blocks = -1
        tasks = [
            {"first": first, "calls": calls[first : first + CALLS_A_TASK]}
            for first in range(0, len(calls), CALLS_A_TASK)
        ]
        dataset = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks))
        done = dataset.map(partial(_call_task, function=function), num_cpus=1, max_retries=0)
        upcoming = 0
        for row in done.iter_rows():
            yield from _alone(function, calls[upcoming : row["first"]])
            results = json.loads(row["results"])
            yield from results
            upcoming = row["first"] + len(results)
        yield from _alone(function, calls[upcoming:])
    finally:
        if started_here:
            ray.shutdown()


def _resources(num_workers: int) -> dict:
    if os.environ.get("RAY_ADDRESS"):
        return {}
    # Ray gives up after half a minute, which a busy machine may need.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    return {"num_cpus": num_workers, "object_store_memory": OBJECT_STORE_BYTES}


def _call_task(row: dict[str, Any], function: Callable) -> dict[str, Any]:
    task = row["task"]
    # As text, because Arrow would give all rows of a column the same keys.
    return {"first": task["first"], "results": json.dumps([function(*call) for call in task["calls"]])}


def _alone(function: Callable, calls: list[tuple]) -> Iterator:
    for call in calls:
        yield call_alone(function, call)
