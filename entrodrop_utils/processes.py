"""Work that is split over the processes of ``accelerate launch`` or ``torchrun``: windows, batches of windows, items of tasks.

A program that neither of them has started is one process, and nothing is split. Every process gets all results in the order of the
items, so that sums over them do not depend on the number of processes.
"""

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


def n_processes() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process that reports and writes; always true in a program of one process."""
    return int(os.environ.get("RANK", "0")) == 0


def local_process() -> int:
    """The number of this process on its machine, which is the number of its accelerator."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def share_of(n: int) -> range:
    """Which of ``n`` items this process computes."""
    return range(int(os.environ.get("RANK", "0")), n, n_processes())


def split_map(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """``function`` of every item, in order. Each process computes its share; all must call this with the same items.

    >>> split_map(abs, [-2, 1])
    [2, 1]
    """
    if n_processes() == 1:
        return [function(item) for item in items]
    import torch  # here: the bars of a program of one process need neither
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=not torch.cuda.is_available())  # connects the processes when it is made the first time
    parts = gather_object([(n, function(items[n])) for n in share_of(len(items))])
    return [result for _, result in sorted(parts, key=lambda part: part[0])]
