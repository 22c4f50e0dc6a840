"""Names for the torch functions and tensor methods that Dynamo puts into a graph.

Dynamo records `torch.nn.functional.silu(x)` as a function object and `x.sum(...)` as a method name. The passes reason
about operations, so both become one name here. Functions are matched by identity: a user's own function that happens to
be called `silu` has no name.
"""

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fx_passes.graph.markers import (
    current_expert,
    each_expert,
    expert_cat,
    expert_count,
    expert_counts,
    expert_parameter,
    expert_places,
    expert_segment,
    experts_hit,
    index_list,
    index_with_expert,
    place_among_hits,
    select_expert,
)

_NAMESPACES = (torch.nn.functional, torch._C._nn, torch, torch.special, torch._C._linalg, operator)

_UNDERSCORED = {operator.and_: "bitwise_and", operator.or_: "bitwise_or", operator.not_: "logical_not"}
"""Python has these names for itself: they write to nothing."""


def _public_functions() -> dict[Callable[..., Any], str]:
    names: dict[Callable[..., Any], str] = {}
    for namespace in _NAMESPACES:
        for name in dir(namespace):
            value = getattr(namespace, name)
            if callable(value) and not inspect.isclass(value) and not name.startswith("_"):
                names.setdefault(value, name)
    names[getattr] = "getattr"
    names[torch.mm] = "mm"
    names[torch._grouped_mm] = "grouped_mm"
    return names | _UNDERSCORED


_OPERATOR_METHODS = frozenset(
    f"__{name}__"
    for name in "add sub mul truediv matmul eq ne gt ge lt le getitem setitem neg pow iadd isub imul itruediv".split()
)
_INPLACE_OPERATORS = frozenset(
    "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift imatmul setitem".split()
)
_FUNCTION_NAMES = _public_functions()
_ATTRIBUTES = {"aten::numpy_T": "T", "aten::mT": "mT"}
"""Operators as which PyTorch from 2.14 on traces attributes of a tensor; `op_name` says "getattr" in any case."""
_OPERATOR_NAMES = {"transformers::grouped_mm_fallback": "grouped_mm", **dict.fromkeys(_ATTRIBUTES, "getattr")}
"""Operators with the meaning and the arguments (without options) of a torch function."""

ZEROS = frozenset(("zeros", "zeros_like", "new_zeros"))
EMPTY = frozenset(("empty", "empty_like", "new_empty"))
POINTWISE = frozenset(
    """
    abs add addcmul bfloat16 celu clamp clamp_max clamp_min clip contiguous cos div double elu erf exp exp2 expm1 float
    ge gelu gt half hardshrink hardsigmoid hardswish hardtanh le leaky_relu lerp log log1p log2 logaddexp logsigmoid lt
    masked_fill max maximum min minimum mish mul multiply nan_to_num neg pow reciprocal relu relu6 rsqrt rsub selu
    sigmoid sign silu sin sinh softplus softshrink softsign sqrt square sub subtract tan tanh tanhshrink threshold to
    true_divide truediv type_as where clone
    """.split()
)

OF_PARAMETERS = POINTWISE | frozenset(
    "linear matmul mm bmm addmm baddbmm einsum sum mean norm softmax cat stack".split()
)
"""What may be computed of parameters alone: it has no effect and draws nothing at random."""

FLATTENING = frozenset(("view", "reshape", "flatten", "ravel"))
CASTS = frozenset("to type float half bfloat16 double type_as".split())
FLOATS = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64))
"""Dtypes in which sums may be made in a wider one instead."""

_WRITES_STATISTICS = frozenset(("batch_norm", "instance_norm"))
_EMBEDDINGS = frozenset(("embedding", "embedding_bag"))
_MAX_NORM = 3
"""Place of the argument with which an embedding shrinks the rows of its weight."""

_INPLACE_ARGUMENT = {
    **dict.fromkeys("relu relu6 silu mish hardswish hardsigmoid selu".split(), 1),
    **dict.fromkeys("elu leaky_relu celu".split(), 2),
    **dict.fromkeys(
        "hardtanh threshold dropout alpha_dropout feature_alpha_dropout dropout1d dropout2d dropout3d".split(), 3
    ),
    "rrelu": 4,
}
_NEVER_RANDOM = frozenset("bool long int half bfloat16 float double getattr sym_sum unique".split())
_HARMLESS = frozenset(
    (
        current_expert,
        each_expert,
        expert_parameter,
        select_expert,
        index_with_expert,
        index_list,
        expert_cat,
        expert_count,
        expert_counts,
        expert_places,
        expert_segment,
        experts_hit,
        place_among_hits,
        torch._C._set_grad_enabled,
    )
)


def op_name(node: fx.Node) -> str | None:
    """`"linear"`, `"getitem"`, `"index_add_"`, ...; None where `node` is not an operation known by name."""
    if node.op == "call_method":
        name = str(node.target)
        return name[2:-2] if name in _OPERATOR_METHODS else name
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload):
            return _OPERATOR_NAMES.get(node.target.name())
        if isinstance(node.target, torch._ops.OpOverloadPacket):
            return _OPERATOR_NAMES.get(node.target._qualified_op_name)
        try:
            return _FUNCTION_NAMES.get(node.target)
        except TypeError:
            return None
    return None


def attribute(node: fx.Node) -> str | None:
    """The name of the attribute that `node` reads: "T", "mT", "shape", ..."""
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return _ATTRIBUTES.get(node.target._qualified_op_name)
    return str(node.args[1]) if node.target is getattr else None


def swaps_last_dims(node: fx.Node, rank: int) -> bool:
    """Whether the attribute that `node` reads of a tensor of so many dims is that with the last two swapped."""
    return attribute(node) == "mT" or (attribute(node) == "T" and rank == 2)


def arg(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Argument of `node` given by position `index` or by keyword `name`."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def by_position(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the operation `name`, of which the leading ones that were given by keyword stand in their places."""
    leading, rest = list(args), dict(kwargs)
    for keyword in ("input", *(("weight", "bias") if name == "linear" else ()))[len(leading) :]:
        if keyword not in rest:
            break
        leading.append(rest.pop(keyword))
    return tuple(leading), rest


def varargs(node: fx.Node, index: int, name: str) -> tuple[Any, ...]:
    """Sizes or dims given as `f(x, 1, 2)`, as `f(x, (1, 2))` or by keyword."""
    if name in node.kwargs:
        value = node.kwargs[name]
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)
    rest = node.args[index:]
    if len(rest) == 1 and isinstance(rest[0], (tuple, list)):
        return tuple(rest[0])
    return tuple(rest)


def example(node: fx.Node) -> Any:
    """The fake value that Dynamo computed for `node` (None where there is none)."""
    return node.meta.get("example_value")


def fake_tensor(node: Any) -> torch.Tensor | None:
    """The fake tensor behind `node`, or None where it is no node or no tensor."""
    value = example(node) if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def known_tensor(node: fx.Node) -> torch.Tensor:
    """The fake tensor behind a node that is known to have one."""
    tensor = fake_tensor(node)
    assert tensor is not None
    return tensor


def same_size(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    """Whether two sizes are equal for every length that the graph is compiled for."""
    return statically_known_true(left == right)


def sizes_of(node: Any) -> tuple[int | torch.SymInt, ...]:
    """The shape of the tensor that `node` is; empty where it is none."""
    tensor = fake_tensor(node)
    return tuple(tensor.shape) if tensor is not None else ()


def same_sizes(left: Sequence[int | torch.SymInt], right: Sequence[int | torch.SymInt]) -> bool:
    """Whether two shapes are equal for every length that the graph is compiled for."""
    return len(left) == len(right) and all(map(same_size, left, right))


def only_pick(items: Sequence[Any], dims: int) -> tuple[int, Any] | None:
    """(dim, item) where `items` index a tensor of so many dims along one of them and take all others whole."""
    items = list(items)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (dims - (len(items) - 1))
    picks = [(dim, item) for dim, item in enumerate(items) if item != slice(None)]
    return picks[0] if len(picks) == 1 else None


def start_of_one(item: Any) -> int | None:
    """e where `item` is the slice e : e + 1."""
    is_one = isinstance(item, slice) and type(item.start) is int and item.stop == item.start + 1
    return item.start if is_one and item.step in (None, 1) else None


def casts_nothing(node: fx.Node) -> bool:
    """Whether `node`, a `to`, keeps dtype and device."""
    before, after = fake_tensor(node.args[0]), fake_tensor(node)
    return before is not None and after is not None and (before.dtype, before.device) == (after.dtype, after.device)


def casts_floats(node: fx.Node) -> bool:
    """Whether `node` casts from one of FLOATS to one, which rounds and does no more."""
    before, after = fake_tensor(arg(node, 0, "input")), fake_tensor(node)
    if op_name(node) not in CASTS or before is None or after is None:
        return False
    return {before.dtype, after.dtype} <= FLOATS


def is_cast_alike(node: fx.Node) -> bool:
    """Whether `node` is `x.type_as(other)` or `x.to(other)` on one device: `other` is asked for its dtype alone."""
    if op_name(node) not in ("type_as", "to") or len(node.args) != 2 or node.kwargs:
        return False
    before, other = (fake_tensor(operand) for operand in node.args)
    return before is not None and other is not None and before.device == other.device


def squeezes_nothing(node: fx.Node) -> bool:
    """Whether `node` is `x.squeeze(dim)` of a dim that isn't one wide."""
    tensor, dim = fake_tensor(arg(node, 0, "input")), arg(node, 1, "dim")
    if op_name(node) != "squeeze" or tensor is None or type(dim) is not int:
        return False
    return statically_known_true(tensor.shape[dim] != 1)


def normalized_dim(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def keeps_last_dim(node: fx.Node) -> bool:
    """Whether the last dim of `node`, which has the entries of its input in the same order, is that of its input."""
    before, after = fake_tensor(node.args[0]), fake_tensor(node)
    if before is None or after is None or not before.dim() or not after.dim():
        return False
    return same_size(before.shape[-1], after.shape[-1])


def is_last_dim(dim: Any, node: Any) -> bool:
    """Whether `dim`, or the one dim in a tuple, is the last of the tensor behind `node`."""
    return is_dim(dim, node, -1)


def is_dim(dim: Any, node: Any, expected: int) -> bool:
    """Whether `dim`, or the one dim in a tuple, is dim `expected` of the tensor behind `node`."""
    tensor = fake_tensor(node)
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if not isinstance(dim, int) or tensor is None:
        return False
    return normalized_dim(dim, tensor.dim()) == normalized_dim(expected, tensor.dim())


def written(node: fx.Node) -> tuple[fx.Node, ...]:
    """The tensors that `node` may write to. An operation that is not known by name may write to all its inputs."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return ()
    if isinstance(node.target, torch._ops.OpOverload):
        return tuple(node.all_input_nodes) if node.target._schema.is_mutable else ()
    name = op_name(node)
    if name is None:
        return () if node.target in _HARMLESS else tuple(node.all_input_nodes)
    shrinks = name in _EMBEDDINGS and arg(node, _MAX_NORM, "max_norm") is not None
    if shrinks or name in _WRITES_STATISTICS or "out" in node.kwargs:
        return tuple(node.all_input_nodes)
    inplace = name in _INPLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    if inplace or arg(node, _INPLACE_ARGUMENT.get(name, 99), "inplace", False):
        return tuple(node.all_input_nodes[:1])
    return ()


def draws_random(node: fx.Node) -> bool:
    """Whether `node` may advance a random number generator."""
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in node.target.tags
    name = op_name(node)
    return name is not None and _draws_random(name)


@functools.cache
def _draws_random(name: str) -> bool:
    """What is no operator of aten, Python or a cast is composed of others, which may."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return not hasattr(operator, name) and name not in _NEVER_RANDOM
    return any(torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags for overload in packet.overloads())


def is_inplace(node: fx.Node) -> bool:
    """Whether `node` may write to one of its inputs."""
    return bool(written(node))


def out_of_place(node: fx.Node) -> str:
    """The name of what `node`, which writes to its first input, computes: "mul" for `mul_` and for `imul`."""
    name = op_name(node) or ""
    return name.removeprefix("i") if name in _INPLACE_OPERATORS else name.removesuffix("_")
