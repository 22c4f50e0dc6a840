"""Runs commands of this package side by side, each in a process of one thread, and yields the JSON lines they print."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finished:
    """What one command printed, and how it ended: `fault` is empty if it ended well."""

    number: int
    lines: list[Any]
    fault: str


def run_all(commands: Sequence[Sequence[str]], *, jobs: int, timeout: float) -> Iterator[Finished]:
    """Yields as commands finish; `number` is a command's place.

    Args:
        commands: arguments of this Python, without its own name.
        jobs: how many run at a time.
        timeout: in seconds, for each; one that takes longer is ended.
    """
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_run, number, command, timeout) for number, command in enumerate(commands)]
        for future in as_completed(futures):
            yield future.result()


def _run(number: int, command: Sequence[str], timeout: float) -> Finished:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SCATTER_MOE_RAISE_FAULTS": "1"}
    fault = ""
    try:
        done = subprocess.run(
            [sys.executable, *command], env=environment, timeout=timeout, capture_output=True, text=True, check=False
        )
        out = done.stdout
        if done.returncode:
            fault = f"exit status {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}"
    except subprocess.TimeoutExpired as slow:
        out = slow.stdout.decode() if isinstance(slow.stdout, bytes) else slow.stdout or ""
        fault = f"took longer than {timeout:g} s"
    return Finished(number, [json.loads(line) for line in out.splitlines() if line.startswith("{")], fault)
