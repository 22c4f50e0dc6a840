"""Where the sum over experts goes: into a tensor of its own, or onto another."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from fx_passes.batched.rows import Total
from fx_passes.forms.accumulation import closure
from fx_passes.graph.ops import ZEROS, is_inplace, op_name
from fx_passes.graph.rounding import with_cast


@dataclass(frozen=True)
class Summation:
    """What a region has to say of its end, in the words of `MoERegion`."""

    result: fx.Node
    inner: frozenset[fx.Node]
    writes: frozenset[fx.Node]
    buffers: tuple[fx.Node, ...]
    addend: fx.Node | None


def summation(node: fx.Node, total: Total, products: Iterable[fx.Node]) -> Summation:
    """Of rows that were computed from `products` and are summed by `node`, which is `total`."""
    onto = total.onto
    result = with_cast(node) if onto is None else node
    inner = closure(products, stops=frozenset((result,))) | {result}
    if onto is None:
        return Summation(result, inner, frozenset(), (), None)
    buffers, writes = ((onto,), frozenset((node,))) if is_inplace(node) else ((), frozenset())
    return Summation(result, inner, writes, buffers, None if op_name(onto) in ZEROS else onto)
