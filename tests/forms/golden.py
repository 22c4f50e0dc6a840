"""A test case whose expected graphs stand in the test itself.

`make goldens` accepts a change; read the diff before committing it.
"""

import pytest
import torch

expecttest = pytest.importorskip("expecttest", reason="goldens are pinned with expecttest, which is not installed here")

from tests.forms.graph_text import rewritten_graph  # noqa: E402
from tests.zoo import ZOO, hidden_states  # noqa: E402

CASES = {case.name: case for case in ZOO}


class Golden(expecttest.TestCase):
    maxDiff = None

    def setUp(self):
        torch._dynamo.reset()

    def golden(self, name: str) -> str:
        return rewritten_graph(CASES[name].make(), hidden_states())
