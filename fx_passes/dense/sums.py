"""Sums of experts' outputs, each times its own weights.

out = 0                                  or fresh zeros, or any tensor that the experts are added to
for e, expert in enumerate(experts):
    out = out + weights_e * expert(x)    or in place; or torch.stack(products, d).sum(d)
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from fx_passes.dense.columns import Column, Tokens, Weights, column_of, masked, tokens_of_expert
from fx_passes.dense.token_body import Scaling
from fx_passes.facts.ids import is_single_choice
from fx_passes.graph.aliasing import allocates
from fx_passes.graph.ops import (
    ZEROS,
    arg,
    casts_floats,
    fake_tensor,
    is_inplace,
    known_tensor,
    normalized_dim,
    op_name,
    same_sizes,
    sizes_of,
)
from fx_passes.graph.rounding import keeps_digits
from fx_passes.graph.views import views_of

_SUMS = frozenset(("add", "iadd", "add_"))
_PRODUCTS = frozenset(("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"))
_STEPS_TO_PRODUCT = 16


@dataclass(frozen=True)
class Term:
    """`output` times the weights of its expert, and perhaps a number; `nodes` lead from it to the product."""

    output: fx.Node
    column: Column
    nodes: tuple[fx.Node, ...]
    scaling: Scaling | None = None

    def goes_with(self, other: "Term") -> bool:
        """Whether the weights of both are taken from the same, and their numbers are the same."""
        return (self.column.weights, self.scaling) == (other.column.weights, other.scaling)

    def times(self, node: fx.Node, number: float) -> "Term | None":
        """The multiple of this that `node` is."""
        is_alike = known_tensor(node).dtype == known_tensor(self.output).dtype
        if self.scaling is not None or not is_alike:
            return None
        return replace(self, scaling=Scaling(number, node), nodes=(*self.nodes, node))


@dataclass(frozen=True)
class Mixture:
    """`outputs[e]` is what expert e makes of all tokens. `nodes` lead from the outputs to `result`.

    Where it `counts_from_the_end`, id -1 is the last expert.

    `slots` says which of each token's choices a term is for. `addend` is what was there before. `start` are fresh zeros
    that were added to.
    """

    outputs: tuple[fx.Node, ...]
    experts: tuple[int, ...]
    weights: Weights
    nodes: tuple[fx.Node, ...]
    result: fx.Node
    addend: fx.Node | None = None
    slots: tuple[int, ...] = ()
    scaling: Scaling | None = None
    counts_from_the_end: bool = False


def weighted_sums(graph: fx.Graph) -> Iterator[Mixture]:
    """Every sum of two or more experts' weighted outputs that is as long as it gets."""
    chains: dict[fx.Node, _Chain] = {}
    for node in graph.nodes:
        chain = _summed_stack(node) or _extended(node, chains) or _begun(node)
        if chain is not None:
            chains[node] = chain
    for result, chain in chains.items():
        if len(chain.terms) > 1 and all(is_product(term.output) for term in chain.terms):
            yield chain.mixture(result)


def is_product(node: fx.Node) -> bool:
    """Whether a matrix product lies shortly before `node`."""
    for _ in range(_STEPS_TO_PRODUCT):
        if op_name(node) in _PRODUCTS:
            return True
        if not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return False


@dataclass(frozen=True)
class _Chain:
    start: Any
    terms: tuple[Term, ...]
    sums: tuple[fx.Node, ...]

    def mixture(self, result: fx.Node) -> Mixture:
        nodes = [node for term in self.terms for node in term.nodes]
        blank = isinstance(self.start, fx.Node) and op_name(self.start) in ZEROS
        return Mixture(
            outputs=tuple(term.output for term in self.terms),
            experts=tuple(term.column.expert for term in self.terms),
            weights=self.terms[0].column.weights,
            nodes=(*nodes, *self.sums, *([self.start] if blank else [])),
            result=result,
            addend=self.start if isinstance(self.start, fx.Node) and not blank else None,
            slots=tuple(term.column.slot for term in self.terms),
            scaling=self.terms[0].scaling,
        )


def _begun(node: fx.Node) -> _Chain | None:
    """`0 + term`, `zeros += term`, `x + term`, `term + term`."""
    operands = _operands(node)
    if operands is None:
        return None
    first, second = (_term(operand, node) for operand in operands)
    if first is not None and second is not None and not is_inplace(node):
        return _Chain(None, (first, second), (node,)) if first.goes_with(second) else None
    if second is not None and may_start(operands[0], node):
        return _Chain(operands[0], (second,), (node,))
    if first is not None and not is_inplace(node) and may_start(operands[1], node):
        return _Chain(operands[1], (first,), (node,))
    return None


def may_start(start: Any, node: fx.Node) -> bool:
    """Zero, fresh zeros, or any tensor of the output's shape, which is written only if nobody else reads it."""
    if not isinstance(start, fx.Node):
        return start == 0
    if not _have_one_shape(start, node) or start.kwargs.get("requires_grad", False):
        return False
    return not is_inplace(node) or (allocates(start) and len(start.users) == 1)


def _extended(node: fx.Node, chains: dict[fx.Node, _Chain]) -> _Chain | None:
    """One more term."""
    operands = _operands(node)
    if operands is None:
        return None
    for sofar, other in (operands,) if is_inplace(node) else (operands, operands[::-1]):
        chain = chains.get(sofar) if isinstance(sofar, fx.Node) else None
        term = _term(other, node) if chain is not None else None
        if chain is not None and term is not None and term.goes_with(chain.terms[0]):
            del chains[sofar]
            return replace(chain, terms=(*chain.terms, term), sums=(*chain.sums, node))
    return None


def _summed_stack(node: fx.Node) -> _Chain | None:
    """`torch.stack(products, d).sum(d)`."""
    stack, dim = arg(node, 0, "input"), arg(node, 1, "dim")
    parts = stacked(stack) if op_name(node) == "sum" and not set(node.kwargs) - {"input", "dim"} else None
    if parts is None or not isinstance(dim, int) or len(node.args) > 2:
        return None
    rank = len(sizes_of(stack))
    terms = [_term(part, node) for part in parts[0]]
    if normalized_dim(dim, rank) != parts[1] or any(term is None for term in terms):
        return None
    known = tuple(term for term in terms if term is not None)
    alike = all(term.goes_with(known[0]) for term in known)
    return _Chain(None, known, (stack, *stack.all_input_nodes, node)) if alike else None


def stacked(node: Any) -> tuple[tuple[fx.Node, ...], int] | None:
    """The tensors that `node` stacks, and along which dim; `cat` of tensors with a new dim stacks them as well."""
    name = op_name(node) if fake_tensor(node) is not None else None
    parts, dim = arg(node, 0, "tensors"), arg(node, 1, "dim", 0)
    if name not in ("stack", "cat", "concat") or not isinstance(parts, (tuple, list)) or not isinstance(dim, int):
        return None
    rank = len(sizes_of(node))
    dim = normalized_dim(dim, rank)
    if name != "stack":
        if any(op_name(part) != "unsqueeze" or normalized_dim(arg(part, 1, "dim"), rank) != dim for part in parts):
            return None
        parts = [arg(part, 0, "input") for part in parts]
    same = all(_have_one_shape(part, parts[0]) for part in parts)
    return (tuple(parts), dim) if same and len(set(parts)) == len(parts) > 1 else None


def _term(node: Any, total: fx.Node) -> Term | None:
    """`weights_e * expert(x)`, casts of it, a multiple of it, or what a mask keeps of it, added up in `total`."""
    if fake_tensor(node) is None:
        return None
    if casts_floats(node):
        return _followed(_term(arg(node, 0, "input"), total), node) if keeps_digits(node, total) else None
    multiple = _multiple(node)
    if multiple is not None:
        term = _term(multiple[0], total)
        return term.times(node, multiple[1]) if term is not None else None
    dims = len(sizes_of(node)) - 1
    for product, zeros, tokens in _masked(node, dims):
        return _kept(_term(product, total) or _of_one_choice(product, tokens), (*zeros, node), tokens)
    return _weighted(node, dims)


def _multiple(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(product, number) of `product * number`."""
    operands = node.args if op_name(node) in ("mul", "multiply") and len(node.args) == 2 else ()
    for product, number in (operands, operands[::-1]) if operands else ():
        if isinstance(product, fx.Node) and type(number) in (int, float):
            return product, float(number)
    return None


def _masked(node: Any, dims: int) -> Iterator[tuple[fx.Node, list[fx.Node], Tokens]]:
    """(product, zeros, tokens) where a mask of an expert's tokens keeps these of a product, and zeros like it else."""
    for product, mask, instead in masked(node):
        tokens = tokens_of_expert(mask, dims, instead)
        if tokens is not None:
            yield product, [source for source in node.all_input_nodes if source.all_input_nodes == [product]], tokens


def _followed(term: Term | None, *nodes: fx.Node) -> Term | None:
    return replace(term, nodes=(*term.nodes, *nodes)) if term is not None else None


def _kept(term: Term | None, nodes: tuple[fx.Node, ...], tokens: Tokens) -> Term | None:
    """`term`, of which a mask keeps `tokens`."""
    return _followed(replace(term, column=term.column.kept(tokens)), *nodes) if term is not None else None


def _weighted(node: fx.Node, dims: int) -> Term | None:
    for output, factor in _factors(node):
        column = column_of(factor, dims, node)
        if column is not None:
            return _of_masked_output(Term(output, column, (node,)), dims)
    return None


def _of_masked_output(term: Term, dims: int) -> Term:
    """`term`, whose output may have been masked before it was weighted."""
    for product, zeros, tokens in _masked(term.output, dims):
        nodes = (*zeros, term.output, *term.nodes)
        return _of_masked_output(replace(term, output=product, column=term.column.kept(tokens), nodes=nodes), dims)
    return term


def _of_one_choice(node: Any, tokens_of: Tokens) -> Term | None:
    """`weights * expert(x)`, where a token has one id and one weight."""
    ids, expert = tokens_of.ids, tokens_of.expert
    for output, factor in _factors(node) if is_single_choice(ids) else ():
        tokens = tuple((dim,) for dim in range(len(sizes_of(factor)) - 1))
        for view in views_of(factor):
            stands_alike = view.dims in ((*tokens, ()), (*tokens, (len(tokens),)))
            if (
                stands_alike
                and same_sizes(sizes_of(view.start), sizes_of(ids))
                and known_tensor(view.start).is_floating_point()
            ):
                return Term(output, Column(Weights(view.start, ids, by_slot=True), expert), (node,))
    return None


def _factors(node: Any) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(output, weights [..., 1]) of a product."""
    if fake_tensor(node) is None or op_name(node) not in ("mul", "multiply") or len(node.args) != 2:
        return
    for output, factor in (node.args, node.args[::-1]):
        sizes = sizes_of(factor)
        if _have_one_shape(output, node) and sizes[-1:] == (1,) and len(sizes) == len(sizes_of(node)):
            yield output, factor


def _operands(node: fx.Node) -> tuple[Any, Any] | None:
    plain = op_name(node) in _SUMS and len(node.args) == 2 and not node.kwargs
    return (node.args[0], node.args[1]) if plain else None


def _have_one_shape(node: Any, other: Any) -> bool:
    own = sizes_of(node)
    return len(own) > 0 and same_sizes(own, sizes_of(other))
