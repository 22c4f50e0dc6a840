"""DTensor: how an operator's tensors may be divided over a mesh.

A rule looks at one dimension of the mesh. It is called with the operator's arguments, each tensor replaced by where it
is, and returns where results come out and where each tensor argument must be. DTensor moves those that are elsewhere;
weights and routing it mustn't move, so rules refuse them.

    tokens     each rank has its own tokens and all weights. Its order sorts the slots of its own tokens, counted from
               the first of them: order is sharded as the tokens are, and the ranks' offsets add up to the whole ones
    columns    each rank has some outputs of every expert (nn.Linear's rows of the weight): of a first projection
    rows       each rank has some inputs of every expert, of a second projection: its result is a partial sum
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from registrations.library import OPS

REPLICATED, PARTIAL = "replicated", "partial"
Placement = int | str  # the dimension that is sharded, or one of these words


class Placed(NamedTuple):
    """A tensor on one dimension of the mesh.

    shape: whole on this dimension of the mesh. placement: an integer, REPLICATED, PARTIAL or another placement's text.
    ranks: the size of the dimension.
    """

    shape: tuple[int, ...]
    placement: Placement
    ranks: int


# Where the results come out, and where each argument that is a tensor or a list of tensors must be.
Division = tuple[Sequence[Placement], Sequence[Placement]]


def sharding(name: str, options_from: int) -> Callable[[Callable[..., Division]], Callable[..., Division]]:
    """Decorator: register a rule. options_from: the first argument that isn't a tensor or a list of tensors."""

    def register(rule: Callable[..., Division]) -> Callable[..., Division]:
        if torch.distributed.is_available():
            _register(getattr(OPS, name).default, rule, options_from)
        return rule

    return register


def tokens_are_sharded(order: Placed, offsets: Placed) -> bool:
    """Whether each rank has the routing of its own tokens. Raises ValueError where order and offsets don't agree."""
    placements = order.placement, offsets.placement
    if placements not in ((REPLICATED, REPLICATED), (0, PARTIAL)):
        raise ValueError(
            f"order, offsets: got placements {placements}, accepted are both replicated, and order sharded by slots "
            "(0) with partial offsets, as route gives them of sharded topk_ids"
        )
    return order.placement == 0


def weight_dims(weight: Sequence[Placed], transposed: bool) -> tuple[int, int]:
    """The dimensions of an expert weight's outputs and of its inputs."""
    last = len(weight[0].shape) - 1
    return (last, last - 1) if transposed else (last - 1, last)


def same_placement(name: str, tensors: Sequence[Placed]) -> Placement:
    """That of all tensors of a list. Raises ValueError where they differ, or where experts are divided."""
    placement = tensors[0].placement
    if any(tensor.placement != placement for tensor in tensors):
        raise ValueError(f"{name}: got tensors with different placements, accepted is the same for all experts")
    if placement == 0 and len(tensors[0].shape) == 3:
        raise ValueError(
            f"{name}: got a tensor that is sharded by experts, which has no rule: tokens must be exchanged, or ids "
            "counted from each rank's first expert. Use scatter_moe.ExpertParallel, or call the operator inside "
            "torch.distributed.tensor.experimental.local_map"
        )
    return placement


def refuse(name: str, given: Placement | Sequence[Placement], accepted: str) -> ValueError:
    return ValueError(f"{name}: got placement {given}, accepted are {accepted}")


def divisible(name: str, size: int, ranks: int) -> None:
    """Raise ValueError where the ranks' parts wouldn't be equal."""
    if size % ranks:
        raise ValueError(f"{name}: got {size} to shard over {ranks} ranks, accepted are multiples of {ranks}")


def _register(op: Any, rule: Callable[..., Division], options_from: int) -> None:
    """As `torch.distributed.tensor.experimental.register_sharding`, which caches by tensors and integers alone: here
    flags and words count too. And it chooses by cost where the choice is a matter of meaning.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, RuntimeSchemaInfo

    takes_tensors = ["Tensor" in str(argument.type) for argument in op._schema.arguments]

    def strategy(schema: OpSchema) -> OpStrategy:
        mesh = schema.get_mesh_from_args()
        specs = [_specs(argument) for argument in schema.args_schema]
        shapes = [[tuple(spec.shape) for spec in group] for group in specs]
        results, inputs = [], []
        for dim in range(mesh.ndim):
            ranks = mesh.size(dim)
            arguments = [
                _placed(argument, group, sizes, dim, ranks) if group else argument
                for argument, group, sizes in zip(schema.args_schema, specs, shapes, strict=True)
            ]
            outputs, places = rule(*arguments)
            by_argument = iter(places)
            of_argument = [next(by_argument) if takes else None for takes in takes_tensors[: len(specs)]]
            shapes = [
                [_part(size, place, ranks) for size in sizes] for sizes, place in zip(shapes, of_argument, strict=True)
            ]
            results.append([_placement(place) for place in outputs])
            inputs.append([_placement(place) for place, group in zip(of_argument, specs, strict=True) for _ in group])
        output_specs = [DTensorSpec(mesh, placements) for placements in zip(*results, strict=True)]
        return OpStrategy(
            [
                OpSpec(
                    output_specs=tuple(output_specs) if len(output_specs) > 1 else output_specs[0],
                    input_specs=[DTensorSpec(mesh, placements) for placements in zip(*inputs, strict=True)],
                    redistribute_cost=[[0.0] for _ in inputs[0]],
                )
            ]
        )

    schema_info = RuntimeSchemaInfo(options_from, needs_pytree=True)
    DTensor._op_dispatcher.sharding_propagator.register_op_strategy(op, strategy, schema_info)


def _specs(argument: Any) -> list[Any]:
    """The DTensorSpecs of an argument: none of one that holds no tensor."""
    children = getattr(argument, "children", argument if isinstance(argument, list | tuple) else [argument])
    return [child.strategies[0].output_spec for child in children if hasattr(child, "strategies")]


def _placed(argument: Any, specs: list[Any], shapes: list[tuple[int, ...]], dim: int, ranks: int) -> Any:
    """What a rule is given for a tensor or a list of tensors."""
    placed = [Placed(shape, _word(spec.placements[dim]), ranks) for spec, shape in zip(specs, shapes, strict=True)]
    return placed[0] if hasattr(argument, "strategies") else placed


def _word(placement: Any) -> Placement:
    from torch.distributed.tensor import Partial, Replicate, Shard

    words = {Replicate(): REPLICATED, Partial(): PARTIAL}
    return placement.dim if type(placement) is Shard else words.get(placement, repr(placement))


def _placement(place: Placement | None) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    if isinstance(place, int):
        return Shard(place)
    return Partial() if place == PARTIAL else Replicate()


def _part(shape: tuple[int, ...], place: Placement | None, ranks: int) -> tuple[int, ...]:
    """The shape that is left for the next dimension of the mesh."""
    return tuple(size // ranks if index == place else size for index, size in enumerate(shape))
