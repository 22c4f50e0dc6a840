"""`if mask.any():`, `if tokens.numel() == 0: continue`, `if e == num_experts: continue`."""

from typing import Any

import torch
from torch import fx
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fx_passes.capture.emptiness import nonempty_question
from fx_passes.capture.events import Guard, Scope
from fx_passes.capture.parts import PartsVariable
from fx_passes.capture.python_state import snapshot
from fx_passes.capture.variables import is_open, read_attribute
from fx_passes.graph.markers import Expert, expert_of, experts_of_each
from fx_passes.graph.ops import arg, op_name

_STRAIGHT = frozenset(("NOP", "CACHE", "EXTENDED_ARG", "NOT_TAKEN"))
_NOT_KNOWN = "a branch on data is not known to ask whether an expert has tokens"
_DOES_MORE = "a branch on data does something other than to skip an expert without tokens"
_LONGEST_BRANCH = 24
"""Instructions of `elif self.training:`, with those that only cache."""
_LOAD_ATTRIBUTE_JUMP = 3
_STRAIGHT_JUMPS = frozenset(("JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE"))


def jump(capture: Any, tx: Any, instruction: Any) -> bool:
    """A branch on data: its side with a token is taken where the other side does nothing."""
    value = tx.stack[-1].realize()
    if isinstance(value, PartsVariable):
        value = tx.stack[-1] = value.sq_length(tx)
    if isinstance(value, SymNodeVariable) and _is_known_to_hold(value.sym_num):
        return False
    if not isinstance(value, (TensorVariable, SymNodeVariable)) or not isinstance(value.proxy, fx.Proxy):
        return False
    sentinel = _sentinel(value.as_proxy().node)
    if sentinel is not None:
        expert, truth = sentinel
        if not capture.is_in_iteration_of(expert) or any(
            mask.expert is expert for mask in capture.masks_of_symbol.values()
        ):
            return False
        if isinstance(expert, int) or _skips_to_header(tx, instruction, truth):
            tx.stack[-1] = ConstantVariable.create(truth)
            if isinstance(expert, fx.Node):
                _exclude(expert, value.as_proxy().node)
        else:
            capture.reject(tx, "loop_runs_to_its_end", "a branch on the expert's number does more than to skip it")
        return False
    question = nonempty_question(value, capture.masks_of_symbol)
    header = _skips_to_header(tx, instruction, question.truth) if question is not None else None
    if question is None or header is None:
        if isinstance(value, TensorVariable) or is_open(value.sym_num):
            capture.reject(tx, "guards_only_skip_empty_experts", _NOT_KNOWN if question is None else _DOES_MORE)
        return False
    if not capture.shows_all(tx):
        return False
    event = capture.event(tx, "empty branch")
    if capture.is_denied(event):
        return False
    tx.stack[-1] = ConstantVariable.create(question.truth)
    size = len(tx.stack) - 2
    guard = Guard(*question.mask.key)
    capture.scopes.append(Scope(event, tx, header, size, snapshot(tx, header, size), guard))
    return False


def _is_known_to_hold(number: Any) -> bool:
    return statically_known_true(number != 0 if isinstance(number, torch.SymInt) else number)


def _sentinel(node: fx.Node) -> tuple[Expert, bool] | None:
    """`if e == num_experts`: known where the loop was unrolled, false by assumption where it was not.

    Under that assumption `e` is no such class.
    """
    name = op_name(node)
    if name not in ("eq", "ne", "ge"):
        return None
    expert, other = expert_of(node.args[0]), arg(node, 1, "other")
    if expert is None or type(other) is not int or experts_of_each(expert) is not None:
        return None
    if isinstance(expert, int):
        return expert, {"eq": expert == other, "ne": expert != other, "ge": expert >= other}[name]
    return expert, name == "ne"


def _exclude(expert: fx.Node, node: fx.Node) -> None:
    """From here on the symbolic expert is none of the classes that the branch on `node` skips."""
    excluded = expert.meta.setdefault("scatter_moe_excluded", {})
    excluded[arg(node, 1, "other")] = "ge" if op_name(node) == "ge" else "eq"


def _skips_to_header(tx: Any, instruction: Any, truth: bool) -> Any | None:
    """The header of the innermost loop, where the side that is not taken goes to it without doing anything."""
    jumps_on_true = "IF_TRUE" in instruction.opname
    skipped = tx.instructions[tx.instruction_pointer + 1] if truth == jumps_on_true else instruction.target
    index = tx.indexof[skipped]
    for _ in range(len(tx.instructions)):
        current = tx.instructions[index]
        if current.opname == "FOR_ITER":
            return current
        if current.opname in _STRAIGHT_JUMPS:
            index = tx.indexof[current.target]
        elif current.opname in _STRAIGHT:
            index += 1
        else:
            known = _after_known_branch(tx, index)
            if known is None:
                return None
            index = known
    return None


def _after_known_branch(tx: Any, index: int) -> int | None:
    """Where `elif self.training:` goes on, which asks a module for a flag; None where anything else stands there."""
    following = tx.instructions[index : index + _LONGEST_BRANCH]
    own = [one for one in following if one.opname not in _STRAIGHT | {"TO_BOOL"}]
    if len(own) < _LOAD_ATTRIBUTE_JUMP or own[1].opname != "LOAD_ATTR":
        return None
    load, attribute, branch = own[:_LOAD_ATTRIBUTE_JUMP]
    if not load.opname.startswith("LOAD_FAST"):
        return None
    if not branch.opname.startswith("POP_JUMP") or not branch.opname.endswith(("IF_TRUE", "IF_FALSE")):
        return None
    truth = _flag(tx, load.argval, attribute.argval)
    if truth is None:
        return None
    jumps = truth == branch.opname.endswith("IF_TRUE")
    return tx.indexof[branch.target] if jumps else tx.indexof[branch] + 1


def _flag(tx: Any, name: Any, attribute: Any) -> bool | None:
    """The flag `attribute` of the module that the local `name` is, which is guarded from now on."""
    variable = tx.symbolic_locals.get(name) if isinstance(name, str) else None
    module = variable.realize() if variable is not None else None
    if not isinstance(module, UnspecializedNNModuleVariable) or type(vars(module.value).get(attribute)) is not bool:
        return None
    flag = read_attribute(tx, module, attribute)
    return flag.as_python_constant() if flag.is_python_constant() else None
