"""Worker pool: one bad task costs that task only, whatever it does to its process."""

import itertools
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rlt_retrieval.data.workers import End, Event, Failure, Item, WorkerPool
from rlt_retrieval.errors import ConfigError, VideoDecodeError

LONG_SECONDS = 60.0  # a timeout that no passing test reaches


def count(start: int, number: int) -> Iterator[int]:
    yield from range(start, start + number)
    return number


def count_for_ever(folder: str) -> Iterator[int]:
    for value in itertools.count():
        Path(folder, str(value)).touch()
        yield value


def double(array: np.ndarray) -> Iterator[np.ndarray]:
    yield array * 2


def environment() -> Iterator[tuple]:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield os.getpid(), os.environ["OMP_NUM_THREADS"], sys.path, signal.SIGINT in blocked


def misbehave(how: str) -> Iterator[object]:
    yield how
    if how == "raise":
        raise ZeroDivisionError("of a number\nby nothing")
    if how == "refuse":
        raise ConfigError("recipe.toml: unknown key `a`; remove it")
    if how == "exit":
        os._exit(3)
    if how == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if how in ("hang", "stubborn"):
        while True:
            time.sleep(1)
    if how == "unpicklable":
        yield lambda: None
    if how == "unpicklable return":
        return lambda: None
    if how == "print":
        print("not data")
    return None


def decode(path: str) -> Iterator[None]:
    raise VideoDecodeError(f"{path}: not a readable video file")
    yield


def process_id(pool: WorkerPool) -> int:
    item, _ = pool.run(environment, [()])
    return item.value[0]


def of_task(events: list[Event], task: int) -> list[Event]:
    return [event for event in events if event.task == task]


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2, LONG_SECONDS) as pool:
        yield pool


@pytest.mark.parametrize("num_workers", [0, 2])
def test_values_and_return_values_come_back_per_task(num_workers: int) -> None:
    with WorkerPool(num_workers, LONG_SECONDS) as pool:
        events = list(pool.run(count, [(10, 2), (20, 0), (30, 1)]))
    assert of_task(events, 0) == [Item(0, 10), Item(0, 11), End(0, 2)]
    assert of_task(events, 1) == [End(1, 0)]
    assert of_task(events, 2) == [Item(2, 30), End(2, 1)]
    assert len(events) == 6


@pytest.mark.parametrize("lookahead", [1, 3, 100])
def test_ordered_events_come_in_task_order(pool: WorkerPool, lookahead: int) -> None:
    tasks = [(10 * i, (7 * i) % 5) for i in range(12)]
    events = list(pool.run(count, tasks, ordered=True, lookahead=lookahead))
    expected = [
        event
        for i, (start, number) in enumerate(tasks)
        for event in [*(Item(i, start + j) for j in range(number)), End(i, number)]
    ]
    assert events == expected


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "ZeroDivisionError: of a number by nothing"),
        ("refuse", "recipe.toml: unknown key `a`; remove it"),
    ],
)
def test_an_exception_is_a_one_line_failure(num_workers: int, how: str, message: str) -> None:
    with WorkerPool(num_workers, LONG_SECONDS) as pool:
        events = list(pool.run(misbehave, [(how,), ("fine",)], ordered=True))
    assert events == [Item(0, how), Failure(0, message), Item(1, "fine"), End(1, None)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("path", ["/home/two  spaces .mp4", "/deep" * 800 + "/v.mp4", "/caf\udce9.mp4"])
def test_a_message_keeps_the_path_as_it_is(num_workers: int, path: str) -> None:
    """Reports name the video themselves and strip it from the reason: it must still be there to find, and end."""
    with WorkerPool(num_workers, LONG_SECONDS) as pool:
        (failure,) = pool.run(decode, [(path,)])
    assert failure == Failure(0, f"{path}: not a readable video file")


@pytest.mark.parametrize("how", ["unpicklable", "unpicklable return"])
def test_a_value_that_cannot_travel_is_a_failure(pool: WorkerPool, how: str) -> None:
    _, failure = pool.run(misbehave, [(how,)])
    assert isinstance(failure, Failure)
    assert "pickle" in failure.message


@pytest.mark.parametrize(
    ("how", "message"),
    [("exit", "the worker process died (exit status 3)"), ("segfault", "the worker process died (SIGSEGV)")],
)
def test_a_worker_that_dies_costs_its_task_only(pool: WorkerPool, how: str, message: str) -> None:
    events = list(pool.run(misbehave, [("fine",), (how,), ("fine",), ("fine",)]))
    assert of_task(events, 1) == [Item(1, how), Failure(1, message)]
    assert sum(isinstance(event, End) for event in events) == 3


@pytest.mark.parametrize("how", ["hang", "stubborn"])
def test_a_decoder_that_never_returns_is_killed_and_others_go_on(how: str) -> None:
    with WorkerPool(2, timeout_seconds=1.0) as pool:
        events = list(pool.run(misbehave, [(how,), *[("fine",)] * 5]))
    assert of_task(events, 0) == [Item(0, how), Failure(0, "no reply for 1 s: killed")]
    assert sum(isinstance(event, End) for event in events) == 5


def test_a_slow_consumer_is_not_a_hanging_worker() -> None:
    """The clock of a worker must not run while its reply waits to be read."""
    with WorkerPool(1, timeout_seconds=0.5) as pool:
        events = []
        for event in pool.run(count, [(0, 1)]):
            time.sleep(0.7)
            events.append(event)
    assert events == [Item(0, 0), End(0, 1)]


def test_an_endless_task_is_at_most_one_value_ahead(pool: WorkerPool, tmp_path: Path) -> None:
    events = pool.run(count_for_ever, [(str(tmp_path),)])
    for _, event in zip(range(5), events, strict=False):
        time.sleep(0.05)  # time enough for a worker without credit to run away
        assert len(list(tmp_path.iterdir())) <= event.value + 2
    events.close()


def test_lookahead_bounds_what_later_tasks_may_pile_up(pool: WorkerPool, tmp_path: Path) -> None:
    """Task 1 is endless and task 0 slow to be read: task 1 must pause, not fill the memory."""
    ahead = tmp_path / "ahead"
    ahead.mkdir()
    head = tmp_path / "head"
    head.mkdir()
    events = pool.run(count_for_ever, [(str(head),), (str(ahead),)], ordered=True, lookahead=4)
    seen = []
    while len(list(ahead.iterdir())) < 4:
        seen.append(next(events))
    seen += itertools.islice(events, 60)
    assert seen == [Item(0, i) for i in range(len(seen))]
    assert 4 <= len(list(ahead.iterdir())) <= 4 + 1
    events.close()


def test_tasks_are_drawn_as_workers_get_free(pool: WorkerPool) -> None:
    drawn = itertools.count()
    events = pool.run(count, ((next(drawn), 1) for _ in itertools.repeat(None)))
    list(itertools.islice(events, 10))
    assert next(drawn) < 20
    events.close()


def test_workers_are_reused_and_survive_an_abandoned_run() -> None:
    with WorkerPool(1, LONG_SECONDS) as pool:
        first, second = (process_id(pool) for _ in range(2))
        assert first == second != os.getpid()
        abandoned = pool.run(count, [(0, 100)])
        assert next(abandoned) == Item(0, 0)
        abandoned.close()
        assert list(pool.run(count, [(5, 1)])) == [Item(0, 5), End(0, 1)]
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_an_idle_worker_that_died_is_replaced() -> None:
    with WorkerPool(1, LONG_SECONDS) as pool:
        pid = process_id(pool)
        os.kill(pid, signal.SIGKILL)
        while pool._idle[0].is_alive:
            time.sleep(0.01)
        assert list(pool.run(count, [(0, 1)])) == [Item(0, 0), End(0, 1)]


def test_arrays_travel_both_ways(pool: WorkerPool) -> None:
    array = np.arange(3_000_000, dtype=np.int32)  # more than a socket holds
    item, _ = pool.run(double, [(array,)])
    np.testing.assert_array_equal(item.value, 2 * array)


def test_a_worker_has_our_import_path_one_thread_and_has_ctrl_c_blocked(pool: WorkerPool) -> None:
    item, _ = pool.run(environment, [()])
    _, threads, path, is_interrupt_blocked = item.value
    assert threads == "1"
    assert is_interrupt_blocked
    assert {os.path.abspath(entry) for entry in sys.path} <= set(path)


def test_a_function_of_main_is_a_clear_failure(pool: WorkerPool) -> None:
    code = textwrap.dedent("""
        from rlt_retrieval.data.workers import WorkerPool
        def job():
            yield 1
        print("once")
        with WorkerPool(1, 60) as pool:
            print(list(pool.run(job, [()])))
    """)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), check=True
    )
    assert done.stdout.startswith('once\n[Failure(task=0, message="AttributeError:')
    assert done.stdout.count("once") == 1


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_what_a_worker_prints_does_not_reach_stdout() -> None:
    code = (
        "from test_workers import *\nwith WorkerPool(1, 60) as pool: list(pool.run(misbehave, [('print',)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), check=True
    )
    assert "not data" not in done.stdout


def test_a_hanging_worker_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import os, signal, sys
        from test_workers import *
        pool = WorkerPool(2, 60)
        events = pool.run(environment, [()])
        pid = next(events).value[0]
        list(events)
        run = pool.run(misbehave, [("hang",)])
        next(run)
        print(pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    for _ in range(200):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"worker {pid} still runs")


def test_events_are_plain_data() -> None:
    assert pickle.loads(pickle.dumps([Item(0, 1), End(0, 2), Failure(1, "why")])) == [
        Item(0, 1),
        End(0, 2),
        Failure(1, "why"),
    ]


@pytest.mark.parametrize(("num_workers", "timeout_seconds"), [(-1, 1.0), (1, 0.0)])
def test_impossible_settings_are_refused(num_workers: int, timeout_seconds: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        WorkerPool(num_workers, timeout_seconds)
