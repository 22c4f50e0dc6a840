"""The pool of processes that the tests share."""

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="package")
def pool() -> Iterator[Pool]:
    """Ended with these tests: the threads of gloo's groups take half of a core, needed or not."""
    pool = Pool()
    yield pool
    pool.close()
