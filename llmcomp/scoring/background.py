"""Range coding behind the model: groups of work whose second half runs on another thread.

model    group 1 | group 2 | group 3 |
coder              group 1 | group 2 | group 3        one thread, at most N_BEHIND groups behind
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from llmcomp import coding

# Groups that may wait for the coder while the model is at work on the next one.
N_BEHIND = 1
Group = TypeVar("Group")
Result = TypeVar("Result")


def in_background(
    groups: Iterable[Group], start: Callable[[Group], Callable[[], Result]], n_behind: int | None = None
) -> Iterator[tuple[Group, Result]]:
    """(group, result) in the order of the groups: `start` is called here, what it returns on another thread.

    So a device works on the next group while the host codes this one. At most `n_behind` groups (default: N_BEHIND)
    are behind; with 0 nothing overlaps. The first error of either side is raised here, and then, as after an interrupt
    or when the caller stops early, no thread and no work is left behind. The caller's backend and threads hold there.
    """
    n_behind = N_BEHIND if n_behind is None else n_behind
    backend, n_threads = coding.backend_in_use(), coding.threads_in_use()

    def call(finish: Callable[[], Result]) -> Result:
        with coding.use_backend(backend), coding.use_threads(n_threads):
            return finish()

    pool = ThreadPoolExecutor(1, thread_name_prefix="llmcomp-coder")
    waiting: deque[tuple[Group, Future[Result]]] = deque()
    try:
        for group in groups:
            waiting.append((group, pool.submit(call, start(group))))
            while len(waiting) > n_behind:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
