"""Processes of one group that stay up for all tests: starting them costs more than what a test does.

    pool.run(function, *args) calls function(*args) in each process and returns their results.

The function is one of a module's own, its arguments and results can be pickled. Inside, torch.distributed is as after
torchrun. After an error the processes are started anew, since their collectives may be out of step.
"""

import time
import traceback
from collections.abc import Callable
from contextlib import closing
from multiprocessing.connection import wait
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD_SIZE = 4
_PATIENCE = 400  # seconds that one call may take, compilation by four processes on few cores included


class Pool:
    """Four processes with gloo, or one for each of some GPUs with nccl."""

    def __init__(self, backend: str = "gloo", world_size: int = WORLD_SIZE) -> None:
        self._backend, self._world_size = backend, world_size
        self._workers: list[tuple[Any, Any]] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if not self._workers:
            self._workers = _start(self._backend, self._world_size)
        for _, connection in self._workers:
            connection.send((function, args))
        results = _receive([connection for _, connection in self._workers])
        errors = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(results) if error]
        if errors:
            self.close()
            raise AssertionError("\n".join(errors))
        return [value for value, _ in results]

    def close(self) -> None:
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers = []


def _start(backend: str, world_size: int) -> list[tuple[Any, Any]]:
    context = mp.get_context("spawn")
    workers = []
    with NamedTemporaryFile(delete=False) as store:
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(backend, rank, world_size, store.name, theirs), daemon=True)
            process.start()
            workers.append((process, ours))
    return workers


def _receive(connections: list[Any]) -> list[tuple[Any, str | None]]:
    """Each one's value or error. After the first error the others, who may wait for that one, get little time."""
    answers: dict[Any, tuple[Any, str | None]] = {}
    deadline = time.monotonic() + _PATIENCE
    while len(answers) < len(connections):
        waiting = [connection for connection in connections if connection not in answers]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            answers |= dict.fromkeys(waiting, (None, "no answer"))
        for connection in ready:
            answers[connection] = _answer(connection)
            if answers[connection][1] is not None:
                deadline = min(deadline, time.monotonic() + 2)
    return [answers[connection] for connection in connections]


def _answer(connection: Any) -> tuple[Any, str | None]:
    try:
        return connection.recv()
    except EOFError:
        return None, "the process ended"


def _serve(backend: str, rank: int, world_size: int, store: str, connection: Any) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
    with closing(connection):
        while True:
            function, args = connection.recv()
            try:
                connection.send((function(*args), None))
            except Exception:  # noqa: BLE001  (whatever it is, the test shall show it)
                connection.send((None, traceback.format_exc()))
