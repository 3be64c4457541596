"""The part of the work that is this process's, where torchrun has started several."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One of several processes that divide jobs among them without talking to each other.

    Attributes:
        rank: of this process, from 0 on.
        count: of the processes.
        local_rank: among those on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> "Share":
        """As torchrun says; alone without it.

        Raises:
            ValueError: its variables make no sense.
        """
        try:
            values = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
            rank, count, local_rank = (int(os.environ.get(name, default)) for name, default in values)
        except ValueError as error:
            raise ValueError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers: {error}") from error
        if not 0 <= rank < count:
            raise ValueError(f"RANK must be below WORLD_SIZE, got {rank} of {count}")
        return cls(rank, count, local_rank)

    @property
    def device(self) -> str:
        """Where it computes, if nothing else is asked for: each process on its own GPU."""
        gpus = torch.cuda.device_count()
        return f"cuda:{self.local_rank % gpus}" if gpus and self.count > 1 else "auto"

    def gather(self, result: T) -> list[T]:
        """The results of all processes, in their order, once the last has come.

        Nobody leaves earlier: torchrun ends all when one of them has ended with a failure.
        """
        if self.count == 1:
            return [result]
        distributed.init_process_group("gloo", timeout=timedelta(days=365))  # one may have more to do
        results: list[T] = [result] * self.count
        distributed.all_gather_object(results, result)
        distributed.destroy_process_group()
        return results

    def of(self, jobs: Sequence[T]) -> list[T]:
        """Every `count`-th of them: all processes together do each once.

        Example:
            >>> Share(rank=1, count=2).of("abcde")
            ['b', 'd']
        """
        return list(jobs[self.rank :: self.count])
