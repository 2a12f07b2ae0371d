"""Work handed to a pool a little ahead of who takes the results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_MOST = 3  # items begun whose results are not taken, for each one ahead


def in_order(submit: Callable[[Item], Future[Result]], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """The results for `items` in their order, at most `ahead` more in work; `Executor.map` would take all at once."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(submit(item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def shared(
    submit: Callable[[Item], Future[Result]], work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """As `in_order`, the caller being one of those who work: on what comes while the pool has `ahead` to do."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        if sum(not each.done() for each in pending) < ahead:
            pending.append(submit(item))
        else:
            own: Future[Result] = Future()
            own.set_result(work(item))
            pending.append(own)
        while pending and (pending[0].done() or len(pending) > _MOST * ahead):
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
