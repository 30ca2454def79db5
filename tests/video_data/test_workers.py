"""Calls on worker processes: order, and a call that takes its process down."""

import operator
import os
import signal
import subprocess
import sys

import pytest

from video_data.workers import call_in_order


def test_results_come_in_order_and_a_crash_costs_one_call():
    calls = [(abs, -i) for i in range(20)]
    calls[3] = calls[11] = (os._exit, 7)
    results = list(call_in_order(operator.call, calls, num_workers=2))
    assert results == [None if i in (3, 11) else i for i in range(20)]


def test_an_error_of_the_function_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(call_in_order(operator.truediv, [(1, 1), (1, 0), (1, 2)], num_workers=1))


def test_workers_end_when_their_parent_is_killed():
    code = (
        "import os, signal\n"
        "from video_data.workers import call_in_order\n"
        "results = call_in_order(abs, [(1,)] * 3, 1)\n"
        "next(results)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # The workers hold the other end of the pipe: were one still there, reading it would reach the time limit.
    process = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60, check=False)
    assert process.returncode == -signal.SIGKILL
