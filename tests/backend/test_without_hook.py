"""A PyTorch whose Dynamo can't be extended: one log line, and what stock Dynamo traces is still rewritten."""

import subprocess
import sys

PROGRAM = """
import logging
from torch._dynamo import symbolic_convert

lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("scatter_moe").addHandler(handler)
translator = symbolic_convert.InstructionTranslatorBase
del symbolic_convert.InstructionTranslatorBase
import scatter_moe
symbolic_convert.InstructionTranslatorBase = translator

from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, observe, rewritten
from tests.zoo import ZOO, hidden_states
from tests.zoo.bodies import HitLoop, RangeLoop
from tests.zoo.case import Case

def count(case, prepare=lambda module: module):
    fresh_dynamo()
    eager, module = case.make(), prepare(case.make())
    assert_same(observe(compile_ours(module), module, hidden_states()), observe(eager, eager, hidden_states()))
    return rewritten()

dense = next(case for case in ZOO if case.name == "dense_einsum")
in_range, hit = Case("range", RangeLoop), Case("hit", HitLoop)
print([count(case) for case in (dense, in_range, hit)])
print([count(case, scatter_moe.prepare) for case in (dense, in_range, hit)])
print(len(lines), "prepare" in lines[0])
"""


def test_what_dynamo_traces_is_rewritten_and_one_line_says_so():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[1, 0, 0]", "[1, 1, 0]", "1 True"]
