"""Creates the nodes of a region's operators: one `mlp`, or its body replayed once on all N grouped rows.

In a replayed body each per-expert linear layer is a `parallel_linear`, an `adapted_linear` where its weight is a sum
with low-rank products, and a parameter that meets rows otherwise is expanded to them.

T tokens, K experts per token, N = T * K slots, E experts.
"""

import operator
from typing import Any

import torch
from torch import fx

from fx_passes.body.linear_body import Linear, as_linear
from fx_passes.body.low_rank import LowRank, low_rank
from fx_passes.body.mlp_body import Mlp
from fx_passes.body.values import Gathered, Op, PerExpert, Shared, SlotGathered, Value, map_values, rank
from fx_passes.body.view_steps import Cut, Index, Step
from fx_passes.body.weighted_body import without_router_weight
from fx_passes.facts.ids import Gated, gated_ids, rows_of_ids, sources_of_ids
from fx_passes.graph.ops import fake_tensor, known_tensor, same_size, same_sizes, sizes_of
from fx_passes.region import GroupedRegion, LoopRegion, MoERegion
from fx_passes.rewriting.loop_invariant import mark_as_ours
from fx_passes.rules.row_wise import NORMS, RESHAPES

ops = torch.ops.scatter_moe

_NO_TENSOR = 2
"""Dims of what is no tensor but a tuple of them, as `chunk` of rows."""


class Emitter:
    """Creates nodes in front of the region's result."""

    def __init__(self, region: MoERegion) -> None:
        self.region = region
        self.graph = region.graph
        self.out_dtype = region.output.dtype
        self.is_grouped = isinstance(region, GroupedRegion)
        self.top_k = region.top_k
        self.made: list[fx.Node] = []
        self._flat: dict[fx.Node, fx.Node] = {}
        self.ids_TK = self._ids(region.ids_TK)
        if region.counts_from_the_end:
            from_end = self._function(torch.add, self.ids_TK, region.num_experts)
            self.ids_TK = self._function(torch.where, self._function(torch.lt, self.ids_TK, 0), from_end, self.ids_TK)
        self.first = region.first_expert if isinstance(region, LoopRegion) else 0
        self.numbers_TK = self._function(torch.sub, self.ids_TK, self.first) if self.first else self.ids_TK
        routed = self._call(ops.route.default, self.numbers_TK, region.num_experts)
        self.order_N = self._function(operator.getitem, routed, 0)
        self.offsets_E = self._function(operator.getitem, routed, 1)
        if self.is_grouped:
            self.order_N, self.top_k = self._as_they_lie(self.order_N), 1
        self._emitted: dict[int, fx.Node] = {}
        self._views: dict[tuple[fx.Node, tuple[Step, ...]], fx.Node] = {}

    def _ids(self, ids: fx.Node) -> fx.Node:
        """The ids [T, K], which may have to be computed first."""
        one_hot, gated = rows_of_ids(ids), gated_ids(ids)
        if gated is not None:
            return self._open(gated)
        return self._by_slot(ids) if one_hot is None else self._classes(one_hot)

    def _open(self, gated: Gated) -> fx.Node:
        """The ids of open gates; what has a closed one is nobody's."""
        gates, ids = self._by_token(gated.gates), self._by_slot(gated.ids)
        own = self._method("gather", gates, 1, self._method("long", ids))
        is_open = self._function(getattr(torch, gated.comparison), own, gated.number)
        return self._function(torch.where, is_open, ids, known_tensor(gated.gates).shape[-1])

    def _classes(self, one_hot: fx.Node) -> fx.Node:
        """The class of each token; what has none is nobody's."""
        rows = self._method("flatten", one_hot, 0, -2) if known_tensor(one_hot).dim() > 2 else one_hot
        rows = self._method("int", rows) if known_tensor(one_hot).dtype == torch.bool else rows
        has_one = self._method("any", rows, 1, True)
        return self._function(torch.where, has_one, self._method("argmax", rows, 1, True), -1)

    def mlp(self, mlp: Mlp) -> fx.Node:
        linears = (mlp.gate_up, mlp.up, mlp.down)
        weights = [self._parameters(linear.weight if linear is not None else None) for linear in linears]
        biases = [self._parameters(linear.bias if linear is not None else None) for linear in linears]
        settings = (
            mlp.activation,
            mlp.layout,
            mlp.gate_up.transposed,
            mlp.weight_on,
            mlp.alpha,
            mlp.limit,
            self.out_dtype,
        )
        topk_weights = self._slots(mlp.weights) if mlp.weights is not None else self._ones(mlp.x)
        x = self._by_token(mlp.x)
        return self._call(ops.mlp.default, x, topk_weights, self.order_N, self.offsets_E, *weights, *biases, *settings)

    def general(self) -> fx.Node:
        if self.is_grouped:
            return self.emit(self.region.body.root)
        weighted = without_router_weight(self.region.body.root)
        rows = self.emit(weighted.core)
        weights = self._slots(weighted.weights) if weighted.weights is not None else None
        return self._call(
            ops.combine.default, rows, weights, self.order_N, self.offsets_E, self.top_k, True, self.out_dtype
        )

    def over(self, base: fx.Node, output: fx.Node) -> fx.Node:
        """`output`, but `base` at tokens without an expert."""
        ids = self.numbers_TK
        has_expert = self._function(
            torch.logical_and, self._function(torch.ge, ids, 0), self._function(torch.lt, ids, self.region.num_experts)
        )
        return self._function(torch.where, has_expert, output, self._by_token(base))

    def by_dims_of_tokens(self, output: fx.Node) -> fx.Node:
        """`output` with the tokens in as many dims as the region has them."""
        sizes = self.region.output.shape[: self.region.token_dims]
        gathered = [value.source for value in self.region.body.of(Gathered)]
        rows = next(
            source
            for source in (*sources_of_ids(self.region.ids_TK), *gathered, *self.graph.nodes)
            if same_sizes(sizes_of(source)[: len(sizes)], sizes)
        )
        own = [size if isinstance(size, int) else self._method("size", rows, at) for at, size in enumerate(sizes)]
        return self._method("unflatten", output, 0, tuple(own))

    def plus(self, addend: fx.Node, output: fx.Node) -> fx.Node:
        return self._function(torch.add, addend, output)

    def emit(self, value: Value) -> fx.Node:
        """The node that holds `value` for all grouped rows."""
        if id(value) not in self._emitted:
            self._emitted[id(value)] = self._derive(value)
        return self._emitted[id(value)]

    def _derive(self, value: Value) -> fx.Node:
        if isinstance(value, Shared):
            return value.node
        if isinstance(value, Gathered):
            return self._gather(value)
        if isinstance(value, SlotGathered):
            return self._gather_slots(value)
        assert isinstance(value, Op)
        linear = as_linear(value)
        if linear is not None:
            return self._linear(linear)
        if value.name in NORMS:
            return self._norm(value)
        if value.name in RESHAPES:
            return self._method("reshape", self.emit(value.args[0]), (-1, *_sizes(value)))
        return self._replay(value)

    def _replay(self, op: Op) -> fx.Node:
        dims = rank(op) or _NO_TENSOR
        args, kwargs = map_values((op.args, op.kwargs), lambda child: self._operand(child, dims))
        is_cast = op.name == "to"  # `type_as` is one, too
        kind, target = ("call_method", "to") if is_cast else (op.node.op, op.node.target)
        return self._located(self.graph.create_node(kind, target, args, kwargs, name=op.node.name))

    def _operand(self, value: Value, dims: int, dtype: torch.dtype | None = None) -> fx.Node:
        return self._expand(value, dims, dtype) if isinstance(value, PerExpert) else self.emit(value)

    def _expand(self, parameter: PerExpert, dims: int, dtype: torch.dtype | None) -> fx.Node:
        """An expert's parameter for each of its rows, shaped to broadcast against rows with `dims` dims."""
        assert not parameter.transposed
        sizes = [int(size) for size in parameter.shape]
        rows = self._method("size", self.order_N, 0)
        arguments = (self._parameters(parameter), self.offsets_E, rows)
        expanded = self._call(ops.expand.default, *arguments, *([] if dtype is None else [dtype]))
        missing = dims - 1 - len(sizes)
        return self._method("reshape", expanded, (-1, *[1] * missing, *sizes)) if missing > 0 else expanded

    def _parameters(self, parameter: PerExpert | None) -> list[fx.Node]:
        """The stack of an expert's parameter, or a tensor for each; nothing where there is none."""
        if parameter is None:
            return []
        own = () if self._are_all(parameter) else (Index((Cut(self.first, self.first + self.region.num_experts),)),)
        return [self._viewed(tensor, (*parameter.steps, *own)) for tensor in parameter.parameters]

    def _are_all(self, parameter: PerExpert) -> bool:
        """Whether a stack holds no expert that the region doesn't have."""
        is_stack = fake_tensor(parameter.stacked) is not None
        return not is_stack or same_size(parameter.count, self.region.num_experts)

    def _viewed(self, tensor: fx.Node, steps: tuple[Step, ...]) -> fx.Node:
        if not steps:
            return tensor
        if (tensor, steps) not in self._views:
            self._views[tensor, steps] = steps[-1].apply(self._function, self._viewed(tensor, steps[:-1]))
        return self._views[tensor, steps]

    def _as_they_lie(self, order_N: fx.Node) -> fx.Node:
        """The order of rows that lie expert by expert already."""
        device = known_tensor(self.region.ids_TK).device
        return self._function(torch.arange, self._method("size", order_N, 0), dtype=torch.int32, device=device)

    def _gather(self, value: Gathered) -> fx.Node:
        if self.is_grouped:
            return value.source
        is_vector = known_tensor(value.source).dim() == 1
        source = self._method("unsqueeze", value.source, -1) if is_vector else self._by_token(value.source)
        rows = self._call(ops.dispatch.default, source, self.order_N, self.offsets_E, self.top_k)
        rows = self._method("squeeze", rows, -1) if is_vector else rows
        for _ in range(value.leading):
            rows = self._method("unsqueeze", rows, 0)
        return rows

    def _gather_slots(self, value: SlotGathered) -> fx.Node:
        if self.is_grouped:
            rows = value.source
        else:
            flat = self._method("flatten", self._slots(value), 0, 1)
            rows = self._method("index_select", flat, 0, self.order_N)
        for _ in range(value.trailing):
            rows = self._method("unsqueeze", rows, -1)
        return rows

    def _slots(self, value: SlotGathered) -> fx.Node:
        """The [T, K] tensor of which `value` holds one entry a row."""
        if not value.table and self.region.slot is not None:
            return self._method("reshape", self._method("select", value.source, -1, self.region.slot), (-1, 1))
        if not value.table:
            return self._by_slot(value.source)
        ids = self._method("clamp", self.ids_TK, 0, self.region.num_experts - 1)
        table = self._method("t", value.source) if value.experts_first else self._by_token(value.source)
        return self._method("gather", table, 1, self._method("long", ids))

    def _by_slot(self, node: fx.Node) -> fx.Node:
        """`node` as [T, K]; one choice a token may have no dim of its own."""
        sizes = sizes_of(node)
        if len(sizes) == 1:
            return self._method("view", node, -1, self.top_k)
        is_by_batch = len(sizes) == 2 and self.top_k == 1 and not same_size(sizes[1], 1)
        return self._method("reshape", node, (-1, 1)) if is_by_batch else self._by_token(node)

    def _by_token(self, node: fx.Node) -> fx.Node:
        """`node` with one dim of tokens."""
        rank = known_tensor(node).dim()
        if rank <= 2:
            return node
        if node not in self._flat:
            self._flat[node] = self._method("flatten", node, 0, rank - 2)
        return self._flat[node]

    def _linear(self, linear: Linear) -> fx.Node:
        sums = low_rank(linear.weight) if self._are_all(linear.weight) else []
        gathers = isinstance(linear.rows, Gathered) and not linear.rows.leading and not self.is_grouped
        source = linear.rows.source if isinstance(linear.rows, Gathered) and gathers else None
        rows = self._by_token(source) if source is not None else self.emit(linear.rows)
        routing, layout = (self.order_N, self.offsets_E), (self.top_k if gathers else 1, not gathers, True)
        rest = (*layout, self._parameters(linear.bias), linear.transposed)
        if not sums:
            return self._call(ops.parallel_linear.default, rows, self._parameters(linear.weight), *routing, *rest)
        lhs, rhs, scale = self._joined(sums)
        return self._call(ops.adapted_linear.default, rows, sums[-1].base, lhs, rhs, *routing, scale, *rest)

    def _joined(self, sums: list[LowRank]) -> tuple[fx.Node, fx.Node, Any]:
        """lhs, rhs and scale of what all of these add."""
        if len(sums) == 1:
            return sums[0].lhs, sums[0].rhs, sums[0].scale
        lhs = [self._method("mul", part.lhs, part.scale) for part in sums]
        return self._function(torch.cat, lhs, 2), self._function(torch.cat, [part.rhs for part in sums], 1), 1.0

    def _norm(self, op: Op) -> fx.Node:
        """A norm whose scale and shift are the expert's own: normalise, then scale in fp32 and round once."""
        names = (
            ("input", "normalized_shape", "weight", "bias", "eps")
            if op.name == "layer_norm"
            else ("input", "normalized_shape", "weight", "eps")
        )
        given = dict(zip(names, op.args, strict=False)) | op.kwargs
        if not any(isinstance(given.get(name), PerExpert) for name in ("weight", "bias")):
            return self._replay(op)
        result = known_tensor(op.node)
        dims, dtype = result.dim(), result.dtype
        wide = torch.promote_types(dtype, torch.float32)
        rows = self._method("to", self.emit(given["input"]), wide)
        settings = {"eps": given["eps"]} if given.get("eps") is not None else {}
        if op.name == "rms_norm" and not settings:
            settings = {"eps": torch.finfo(dtype).eps}
        rows = self._function(op.node.target, rows, given["normalized_shape"], **settings)
        if given.get("weight") is not None:
            rows = self._method("mul", rows, self._operand(given["weight"], dims, wide))
        if given.get("bias") is not None:
            rows = self._method("add", rows, self._operand(given["bias"], dims, wide))
        return self._method("to", rows, dtype)

    def _ones(self, x: fx.Node) -> fx.Node:
        order = self._method("reshape", self.order_N, (-1, self.top_k))
        return self._function(torch.ones_like, order, dtype=known_tensor(x).dtype)

    def _call(self, op: Any, *args: Any) -> fx.Node:
        return self._function(op, *args)

    def _function(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        return self._located(node)

    def _method(self, name: str, *args: Any) -> fx.Node:
        return self._located(self.graph.call_method(name, args))

    def _located(self, node: fx.Node) -> fx.Node:
        mark_as_ours(node)
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in self.region.result.meta:
                node.meta[key] = self.region.result.meta[key]
        self.made.append(node)
        return node


def _sizes(op: Op) -> list[int]:
    return [int(size) for size in known_tensor(op.node).shape[1:]]
