"""Threads that may hang: a few, replaced while they do, and never in the way of a process that wants to end."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)

#: The most threads there ever are, however many of them hang.
_MOST = 32


class Workers:
    """Runs jobs in the order in which they come. Safe to use from several threads.

    Not ``ThreadPoolExecutor``, because a read of a store that never answers would keep one of its threads for ever, all
    of them soon, and the end of the process.

    Args:
        name: of the threads.
        count: jobs that run at the same time, those that are late not counted.
        late_after_s: a job that runs longer is late, and another thread takes its place.
        clock: seconds that only grow.
    """

    def __init__(
        self, name: str, count: int, late_after_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name = name
        self._count = count
        self._late_after_s = late_after_s
        self._clock = clock
        self._changed = threading.Condition()
        self._queue: deque[Callable[[], None]] = deque()
        self._threads: set[threading.Thread] = set()
        self._started: dict[threading.Thread, float] = {}  # of the job at hand
        self._closed = False

    def submit(self, job: Callable[[], None]) -> bool:
        """Have ``job`` run, which should raise nothing; false, and it is not, once closed or without any thread."""
        with self._changed:
            if self._closed:
                return False
            self._queue.append(job)
            while len(self._threads) - len(self._started) < len(self._queue) and self._may_start():
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the system has no more
                    break
                self._threads.add(thread)
            if not self._threads:
                self._queue.pop()
                return False
            self._changed.notify()
        return True

    def close(self, wait_s: float) -> None:
        """Drop what has not begun, wait so long at most for what has, and end the threads that do not hang."""
        deadline = time.monotonic() + wait_s
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _may_start(self) -> bool:
        return len(self._threads) - self._late() < self._count and len(self._threads) < _MOST

    def _late(self) -> int:
        return sum(self._clock() - started > self._late_after_s for started in self._started.values())

    def _run(self) -> None:
        me = threading.current_thread()
        while True:
            with self._changed:
                self._started.pop(me, None)
                while not self._queue and not self._closed:
                    self._changed.wait()
                # One that was late was replaced, and is one too many when it comes back.
                if self._closed or len(self._threads) - self._late() > self._count:
                    self._threads.discard(me)
                    self._changed.notify()  # for another one, should this one have been meant
                    return
                job = self._queue.popleft()
                self._started[me] = self._clock()
            try:
                job()
            # Broad on purpose: whatever a job raises, the thread has others to do.
            except BaseException:
                logger.exception("a job of %s failed", self._name)
            del job  # what it holds must not live until the next one comes
