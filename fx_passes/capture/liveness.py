"""Which local variables does code from an instruction on still read?

The textbook backward dataflow over Dynamo's instructions. Dynamo's own analysis treats everything behind a jump as
read, which would call every variable of a loop body live.
"""

from typing import Any
from weakref import WeakKeyDictionary

from torch._dynamo.bytecode_analysis import JUMP_OPCODES, TERMINAL_OPCODES

_known: WeakKeyDictionary[Any, list[frozenset[str]]] = WeakKeyDictionary()


def live_locals(tx: Any, at: Any) -> frozenset[str]:
    """Names that are read from instruction `at` of `tx` on before they are written.

    Cells are always live: closures read them.
    """
    code = tx.f_code
    if code not in _known:
        _known[code] = _analyse(tx.instructions)
    return _known[code][tx.indexof[at]] | frozenset((*code.co_cellvars, *code.co_freevars))


def _analyse(instructions: list[Any]) -> list[frozenset[str]]:
    index = {instruction: place for place, instruction in enumerate(instructions)}
    successors = [_successors(instruction, place, index) for place, instruction in enumerate(instructions)]
    live: list[frozenset[str]] = [frozenset()] * len(instructions)
    changed = True
    while changed:
        changed = False
        for place in range(len(instructions) - 1, -1, -1):
            after = frozenset().union(*(live[successor] for successor in successors[place]))
            now = _before(instructions[place], after)
            changed |= now != live[place]
            live[place] = now
    return live


def _successors(instruction: Any, place: int, index: dict[Any, int]) -> list[int]:
    following = [] if instruction.opcode in TERMINAL_OPCODES else [place + 1]
    if instruction.opcode in JUMP_OPCODES and instruction.target is not None:
        following.append(index[instruction.target])
    if instruction.exn_tab_entry is not None:
        following.append(index[instruction.exn_tab_entry.target])
    return following


def _before(instruction: Any, after: frozenset[str]) -> frozenset[str]:
    name = instruction.opname
    if "FAST" not in name and "NAME" not in name:
        return after
    names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
    if name.startswith(("STORE_FAST", "DELETE_FAST")) and "LOAD" not in name:
        return after - set(names)
    return after | {local for local in names if isinstance(local, str)} if name.startswith("LOAD_FAST") else after
