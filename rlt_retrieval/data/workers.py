"""Worker processes for decoding: a task that hangs or crashes costs that task, never the job.

Each worker is a fresh interpreter (`python -m rlt_retrieval.data.workers`), so a user's `__main__` is not
run again and needs no guard, and it talks over a private socket pair (POSIX only). Messages are pickled: both
ends are our own processes and nobody else holds the socket, so nothing foreign is ever unpickled.

A worker computes one value when asked for it. The parent asks for the next as soon as a reply is there, so a
worker is at most one value ahead, an endless generator needs no more memory than a short one, and the timeout
counts only the seconds in which the worker owes a reply.
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from rlt_retrieval.errors import RetrievalError

START_SECONDS = 120.0  # allowed on top of the timeout until a worker has imported the function it is to call
PARENT_CHECK_SECONDS = 1.0
MESSAGE_CHARACTERS = 5000  # the longest path (4096) and a sentence


@dataclass(frozen=True)
class Item:
    """A value that the generator of task number `task` yielded."""

    task: int
    value: Any


@dataclass(frozen=True)
class End:
    """The generator of task number `task` is exhausted; `value` is what it returned."""

    task: int
    value: Any


@dataclass(frozen=True)
class Failure:
    """Task number `task` raised, hung or died; none of its events follow. `message` is one line."""

    task: int
    message: str


Event = Item | End | Failure
_EVENTS: dict[str, type[Event]] = {"item": Item, "end": End, "failure": Failure}


class WorkerPool:
    """Runs generator functions in worker processes that are killed when they do not answer.

    num_workers: processes, started when first needed and kept for later runs; 0 computes in this process,
        with the same events but no protection against hangs and crashes.
    timeout_seconds: the longest wait for one value of a task (or for its end).
    """

    def __init__(self, num_workers: int, timeout_seconds: float) -> None:
        if num_workers < 0 or timeout_seconds <= 0:
            raise ValueError(f"expected >= 0 workers, timeout > 0; got {num_workers}, {timeout_seconds}")
        self._num_workers, self._timeout_seconds = num_workers, timeout_seconds
        self._idle: list[_Worker] = []
        self._started: weakref.WeakSet[_Worker] = weakref.WeakSet()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers. A run that another thread is in the middle of sees its tasks fail, and can end."""
        for worker in list(self._started):
            worker.stop()
        while self._idle:
            self._idle.pop().kill()

    def run(
        self,
        function: Callable[..., Iterator],
        tasks: Iterable[tuple],
        *,
        ordered: bool = False,
        lookahead: int = 16,
    ) -> Generator[Event, None, None]:
        """Call the generator function `function(*task)` for every task, several at a time.

        `function` must be importable by its module and name (not from a `__main__`). Every yielded value
        becomes an Item, the return value an End; an exception, a reply that does not come in time or the
        death of the process a Failure. The events of one task keep their order. With `ordered`, all events of
        a task come before those of the next; events of later tasks wait here, about `lookahead` of them, then
        their workers pause. Closing the iterator early kills the workers that are in the middle of a task.
        """
        if self._num_workers == 0:
            yield from _run_here(function, tasks)
            return
        waiting = enumerate(tasks)
        sequence = _Sequence(lookahead if ordered else None)
        busy: list[_Worker] = []
        due: list[Event] = []
        try:
            while True:
                # First give out work, then hand out results: workers compute while the caller does.
                while len(busy) < self._num_workers and sequence.has_room:
                    if (numbered := next(waiting, None)) is None:
                        break
                    busy.append(self._idle_worker())
                    busy[-1].begin(numbered[0], function, numbered[1])
                for worker in busy:
                    if not worker.owes_reply and sequence.may_ask(worker.task):
                        worker.ask()
                yield from due
                if not busy:
                    return
                due = [later for event in self._collect(busy) for later in sequence.put(event)]
        finally:
            for worker in busy:
                worker.kill()

    def _idle_worker(self) -> "_Worker":
        while self._idle:
            worker = self._idle.pop()
            if worker.is_alive:
                return worker
            worker.kill()
        worker = _Worker(self._timeout_seconds)
        self._started.add(worker)
        return worker

    def _collect(self, busy: list["_Worker"]) -> list[Event]:
        """Wait until a worker replies or is overdue; workers whose task is over leave `busy`."""
        owing = [worker for worker in busy if worker.owes_reply]
        patience = min(worker.deadline for worker in owing) - time.monotonic()
        # A reply that lies there counts, however late this process comes to read it.
        ready = wait([worker.connection for worker in owing], timeout=min(max(0.0, patience), 3600.0))
        now = time.monotonic()
        events: list[Event] = []
        for worker in owing:
            if worker.connection in ready:
                event = worker.receive()
            elif now >= worker.deadline:
                event = worker.fail(f"no reply for {self._timeout_seconds:g} s: killed")
            else:
                continue
            if isinstance(event, End | Failure):
                busy.remove(worker)
                if worker.is_alive:
                    self._idle.append(worker)
            if event is not None:
                events.append(event)
        return events


class _Sequence:
    """Holds back the events of later tasks; without `lookahead` it lets all pass as they come."""

    def __init__(self, lookahead: int | None) -> None:
        self._lookahead = lookahead
        self._current = 0  # the task whose events are due
        self._held: dict[int, list[Event]] = {}

    @property
    def has_room(self) -> bool:
        return self._lookahead is None or sum(map(len, self._held.values())) < self._lookahead

    def may_ask(self, task: int) -> bool:
        """The current task never waits, so the ones behind it always get their turn."""
        return task == self._current or self.has_room

    def put(self, event: Event) -> Iterator[Event]:
        if self._lookahead is not None and event.task != self._current:
            self._held.setdefault(event.task, []).append(event)
            return
        due = [event]
        while due:
            yield from due
            if not isinstance(due[-1], End | Failure) or self._lookahead is None:
                return
            self._current += 1
            due = self._held.pop(self._current, [])


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self.owes_reply, self.deadline, self.task = False, 0.0, -1
        ours, theirs = socket.socketpair()
        # The same import path as here, in the same order; `-P` keeps the working folder out of it.
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        with theirs, _interrupt_held_back():
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __spec__.name, str(theirs.fileno()), str(os.getpid())],
                env={**os.environ, "PYTHONPATH": path, **one_thread},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout is for data: whatever a worker prints goes to stderr
            )
        self.connection = Connection(ours.detach())

    @property
    def is_alive(self) -> bool:
        """To be asked when no reply is owed: something to read then is the end of file of a dead process."""
        return not self.connection.closed and not self.connection.poll() and self._process.poll() is None

    def begin(self, number: int, function: Callable[..., Iterator], task: tuple) -> None:
        self.task = number
        self._request(pickle.dumps((function, task)), START_SECONDS + self._timeout_seconds)

    def ask(self) -> None:
        self._request(b"", self._timeout_seconds)

    def _request(self, message: bytes, seconds: float) -> None:
        self.owes_reply, self.deadline = True, time.monotonic() + seconds
        with contextlib.suppress(OSError):  # a dead worker shows as an end of file when its reply is read
            self.connection.send_bytes(message)

    def receive(self) -> Event | None:
        """The reply as an event; None when it only says that the worker has begun to compute."""
        try:
            kind, value = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return self.fail()
        if kind == "begun":
            self.deadline = time.monotonic() + self._timeout_seconds
            return None
        self.owes_reply = False
        return _EVENTS[kind](self.task, value)

    def fail(self, why: str | None = None) -> Failure:
        """Kill the process; without a reason given, say how it had died."""
        if why is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1)
            status = self._process.poll()
            how = (
                signal.Signals(-status).name if status is not None and status < 0 else f"exit status {status}"
            )
            why = f"the worker process died ({how})"
        self.kill()
        return Failure(self.task, why)

    def stop(self) -> None:
        """Kill the process and no more: whoever waits for its reply gets an end of file."""
        self._process.kill()

    def kill(self) -> None:
        self.connection.close()
        self.stop()
        with contextlib.suppress(
            subprocess.TimeoutExpired
        ):  # stuck in the kernel, e.g. on a dead network disk
            self._process.wait(timeout=5)


@contextlib.contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Ctrl-C is the parent's to handle: a process started in here has SIGINT blocked from its first instruction."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_here(function: Callable[..., Iterator], tasks: Iterable[tuple]) -> Iterator[Event]:
    for number, task in enumerate(tasks):
        steps: Iterator | None = None
        event: Event | None = None
        while not isinstance(event, End | Failure):
            try:
                steps = function(*task) if steps is None else steps
                event = Item(number, next(steps))
            except StopIteration as stop:
                event = End(number, stop.value)
            except Exception as error:  # whatever goes wrong in a task is that task's failure, as in a worker
                event = Failure(number, _one_line(error))
            yield event


def _one_line(error: Exception) -> str:
    text = str(error) if isinstance(error, RetrievalError) else f"{type(error).__name__}: {error}"
    # Spaces inside a line stay: whoever strips the name of the file must find it as it is.
    return " ".join(line.strip() for line in text.splitlines() if line.strip())[:MESSAGE_CHARACTERS]


# ---------------------------------------------------------------------------------- in the worker process


def _serve(connection: Connection) -> None:
    """Answer until the parent is gone: a pickled (function, task) begins a task, b"" asks for more."""
    steps: Iterator = iter(())
    while True:
        request = connection.recv_bytes()
        try:
            if request:
                function, task = pickle.loads(request)
                connection.send_bytes(
                    pickle.dumps(("begun", None))
                )  # imports are done: the timeout starts now
                steps = function(*task)
            reply = pickle.dumps(_step(steps))
        except Exception as error:  # reported as the task's failure; the worker lives on
            reply = pickle.dumps(("failure", _one_line(error)))
        connection.send_bytes(reply)


def _step(steps: Iterator) -> tuple[str, Any]:
    try:
        return "item", next(steps)
    except StopIteration as stop:
        return "end", stop.value


def _exit_with_parent(parent: int) -> None:
    """A call that never returns to Python must not outlive a parent that was killed."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(1)


def main() -> None:
    """Entry point of a worker process; arguments: the socket's descriptor, the parent's process id."""
    descriptor, parent = map(int, sys.argv[1:])
    threading.Thread(target=_exit_with_parent, args=[parent], daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        _serve(Connection(descriptor))
    os._exit(0)  # at once: nothing here is worth an exit handler that may hang


if __name__ == "__main__":
    main()
