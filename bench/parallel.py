"""Cases in processes of their own: all of them compile at once, one at a time has the device."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# Where one process does everything, none has to wait.
_turn: Any = nullcontext()


def my_turn() -> AbstractContextManager[Any]:
    """To be held while something is timed."""
    return _turn


def in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], jobs: int
) -> Iterator[Result]:
    """``function`` of each, as soon as it is there: in no order, where there are several jobs."""
    if jobs == 1:
        yield from map(function, items)
        return
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=_start, initargs=(spawn.Lock(),)) as pool:
        try:
            for done in as_completed([pool.submit(function, item) for item in items]):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start(turn: Any) -> None:
    global _turn
    _turn = turn
    torch.set_num_threads(1)  # the processes share the cores
