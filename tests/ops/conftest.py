"""Every operator test runs with poisoned memory."""

import pytest


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory):
    """The fixture it uses does it."""
