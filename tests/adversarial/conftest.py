"""Prints what became of the programs, and the seed that draws them again."""

import os
from collections import Counter

import pytest

SEED = int(os.environ.get("SCATTER_MOE_SEED", "0"))
TALLY: pytest.StashKey[Counter[str]] = pytest.StashKey()


def pytest_terminal_summary(terminalreporter, config):
    tally = config.stash.get(TALLY, None)
    if tally:
        told = ", ".join(f"{number} {what}" for what, number in sorted(tally.items()))
        terminalreporter.write_line(f"adversarial programs, seed {SEED}: {told}")
