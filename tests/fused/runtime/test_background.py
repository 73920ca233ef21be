"""Work in background threads: taken once, its errors raised where it is taken, and no trouble for a fork or an exit."""

import os
import signal
import subprocess
import sys
import threading

import pytest

import fused
from fused.runtime import background


@pytest.fixture
def key(request):
    """A key that no other test uses."""
    return request.node.nodeid


def test_work_is_done_once_and_taken_once(key):
    threads = []

    def work():
        threads.append(threading.current_thread())
        return len(threads)

    background.start(key, work)
    background.start(key, work)
    assert background.take(key, work) == 1
    assert background.take(key, work) == 2  # nothing is kept: this thread did it
    assert threads[0] is not threading.current_thread() and threads[1] is threading.current_thread()


def test_errors_are_raised_where_the_result_is_taken(key):
    def work():
        raise ValueError(f"in {threading.current_thread().name}")

    background.start(key, work)
    with pytest.raises(ValueError, match=f"in {threading.current_thread().name}"):
        background.take(key, work)


def test_work_that_no_thread_has_begun_is_done_at_once(key):
    """A full pool does not keep the caller waiting."""
    go = threading.Event()
    for i in range(background.MAX_THREADS):
        background.start((key, i), go.wait)
    background.start(key, lambda: "thread")
    try:
        assert background.take(key, lambda: "caller") == "caller"
    finally:
        go.set()
        assert all(background.take((key, i), lambda: False) for i in range(background.MAX_THREADS))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_the_results_and_threads_of_its_own(key):
    """A fork waits for work that runs. Then the child takes it, and starts work, as its parent does."""
    begun, go, done = threading.Event(), threading.Event(), []

    def work():
        begun.set()
        go.wait()
        done.append(True)
        return "parent"

    background.start(key, work)
    begun.wait()
    threading.Timer(0.1, go.set).start()
    child = os.fork()
    if not child:
        try:
            signal.alarm(30)
            background.start((key, "child"), lambda: "child")
            took = [background.take(key, lambda: "again"), background.take((key, "child"), lambda: "again")]
            os._exit(0 if done and took == ["parent", "child"] else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert background.take(key, lambda: "again") == "parent"


def test_the_process_ends_behind_its_work():
    """It does not wait for ever, and does not break off what writes a file."""
    script = f"""
import sys, time, types
sys.modules["fused"] = package = types.ModuleType("fused")  # without its imports, PyTorch for one, it starts at once
package.__path__ = {list(fused.__path__)!r}
from fused.runtime import background
background.start("key", lambda: (time.sleep(0.2), print("written", flush=True)))
print("end", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\nwritten\n", "")
