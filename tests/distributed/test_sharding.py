"""DTensor's rules of the operators: tokens sharded, weights sharded by columns and rows, both; and what is refused.

T tokens, K experts per token, E experts, D model width, F expert width.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map

import scatter_moe  # noqa: F401  (registers the operators)
from tests.distributed.pool import WORLD_SIZE

T, K, E, D, F = 8, 2, 3, 6, 4
OPS = torch.ops.scatter_moe
R = Replicate()

# A mesh, and the placements of: tokens, columns of first projections, rows of second projections. All by their last
# dimensions, so that they hold for stacked weights and for lists.
MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "replicated": ((4,), ("replicated",)),
    "tokens": ((4,), ("tokens",)),
    "columns": ((4,), ("columns",)),
    "tokens and columns": ((2, 2), ("tokens", "columns")),
    "columns and tokens": ((2, 2), ("columns", "tokens")),
    "tokens twice": ((2, 2), ("tokens", "tokens")),
}


def placed(tensor: Tensor, mesh: DeviceMesh, ways: tuple[str, ...], role: str, dim: int = 0) -> DTensor:
    """role: the way of dividing the work that shards this tensor, in `dim`."""
    placements = [Shard(dim % tensor.dim()) if way == role else R for way in ways]
    return distribute_tensor(tensor.detach(), mesh, placements).requires_grad_(tensor.requires_grad)


def normal(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, requires_grad=True)


def routed() -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and router weights; one id is a sentinel, and one expert has no token."""
    ids = torch.rand(T, E).argsort(1)[:, :K] % (E - 1)
    ids[3, 1] = E
    return normal(T, D), ids, normal(T, K)


def assert_same(name: str, got: Tensor, expected: Tensor) -> None:
    whole = got.full_tensor() if isinstance(got, DTensor) else got
    torch.testing.assert_close(whole, expected, rtol=1e-9, atol=1e-9, msg=lambda m: f"{name}: {m}")


def compare(run: Callable[..., Tensor], plain: dict[str, Any], sharded: dict[str, Any]) -> list[Placement]:
    """Outputs and every gradient; returns where the output was."""
    upstream = torch.randn(run(**plain).shape, dtype=torch.float64)
    outputs = []
    for arguments in (plain, sharded):
        y = run(**arguments)
        outputs.append(y)
        whole = y.full_tensor() if isinstance(y, DTensor) else y
        (whole * upstream).sum().backward()
    assert_same("y", outputs[1].detach(), outputs[0].detach())
    for name, value in plain.items():
        tensors, others = (v if isinstance(v, list) else [v] for v in (value, sharded[name]))
        grads = [tensor.grad for tensor in tensors if tensor.requires_grad]
        assert not grads or max(grad.abs().max() for grad in grads) > 0, f"gradient of {name} is zero"
        for grad, other in zip(grads, others, strict=False):
            assert_same(f"gradient of {name}", other.grad, grad)
    return list(outputs[1].placements)


def mlp_tensors(layout: str, listed: bool, transposed: bool) -> dict[str, Any]:
    """Every parameter, with biases, as the operator takes them."""

    def weight(out: int, into: int) -> list[Tensor]:
        size = (into, out) if transposed else (out, into)
        return [normal(*size) for _ in range(E)] if listed else [normal(E, *size)]

    def bias(size: int) -> list[Tensor]:
        return [normal(size) for _ in range(E)] if listed else [normal(E, size)]

    x, ids, topk_weights = routed()
    width = 2 * F if layout in ("interleaved", "concatenated") else F
    separate = layout == "separate"
    return {
        "x": x,
        "ids": ids,
        "topk_weights": topk_weights,
        "gate_up": weight(width, D),
        "up": weight(F, D) if separate else [],
        "down": weight(D, F),
        "gate_up_bias": bias(width),
        "up_bias": bias(F) if separate else [],
        "down_bias": bias(D),
    }


def shard_mlp(plain: dict[str, Any], mesh: DeviceMesh, ways: tuple[str, ...], transposed: bool) -> dict[str, Any]:
    column, row = (-1, -2) if transposed else (-2, -1)
    dims = {"gate_up": column, "up": column, "down": row, "gate_up_bias": -1, "up_bias": -1}
    sharded = {name: placed(plain[name], mesh, ways, "tokens") for name in ("x", "ids", "topk_weights")}
    for name in ("gate_up", "up", "down", "gate_up_bias", "up_bias", "down_bias"):
        role = "columns" if name in dims else "nothing"
        sharded[name] = [placed(tensor, mesh, ways, role, dims.get(name, 0)) for tensor in plain[name]]
    return sharded


def run_mlp(x: Tensor, ids: Tensor, topk_weights: Tensor, *, options: tuple, **parameters: list[Tensor]) -> Tensor:
    activation, layout, transposed, weight_on = options
    order, offsets = OPS.route(ids, E)
    return OPS.mlp(x, topk_weights, order, offsets, *parameters.values(), activation, layout, transposed, weight_on)


def mlp_on_rank(name: str, layout: str, listed: bool, transposed: bool, weight_on: str) -> list[Placement]:
    torch.manual_seed(0)
    size, ways = MESHES[name]
    mesh = init_device_mesh("cpu", size)
    plain = mlp_tensors(layout, listed, transposed)
    sharded = shard_mlp(plain, mesh, ways, transposed)
    options = ("silu", layout, transposed, weight_on)
    placements = compare(lambda **tensors: run_mlp(**tensors, options=options), plain, sharded)
    with torch.no_grad():
        assert_same("y without gradients", run_mlp(**sharded, options=options), run_mlp(**plain, options=options))
    return placements


def output_of(ways: tuple[str, ...]) -> list[Placement]:
    return [{"tokens": Shard(0), "columns": Partial(), "replicated": R}[way] for way in ways]


@pytest.mark.parametrize(
    ("name", "layout", "listed", "transposed", "weight_on"),
    [
        ("replicated", "concatenated", False, False, "output"),
        ("tokens", "concatenated", True, False, "output"),
        ("tokens", "interleaved", False, True, "input"),
        ("tokens twice", "separate", False, False, "output"),
        ("columns", "plain", False, True, "output"),
        ("columns", "plain", True, False, "input"),
        ("columns", "interleaved", False, False, "input"),
        ("columns", "separate", True, True, "output"),
        ("tokens and columns", "separate", False, False, "output"),
        ("columns and tokens", "interleaved", True, True, "output"),
    ],
)
def test_mlp_equals_one_process(pool, name, layout, listed, transposed, weight_on):
    for placements in pool.run(mlp_on_rank, name, layout, listed, transposed, weight_on):
        assert placements == output_of(MESHES[name][1])


def run_linears(x: Tensor, ids: Tensor, topk_weights: Tensor, transposed: bool, **parameters: list[Tensor]) -> Tensor:
    """An expert of two linears, rows grouped between them."""
    first, first_bias, second, second_bias = parameters.values()
    order, offsets = OPS.route(ids, E)
    h = OPS.parallel_linear(x, first, order, offsets, K, False, True, first_bias, transposed)
    rows = OPS.parallel_linear(torch.tanh(h), second, order, offsets, 1, True, True, second_bias, transposed)
    return OPS.combine(rows, topk_weights, order, offsets, K, True)


def linears_on_rank(name: str, listed: bool, transposed: bool) -> list[Placement]:
    torch.manual_seed(0)
    size, ways = MESHES[name]
    mesh = init_device_mesh("cpu", size)
    plain = mlp_tensors("plain", listed, transposed)
    sharded = shard_mlp(plain, mesh, ways, transposed)
    names = ("x", "ids", "topk_weights", "gate_up", "gate_up_bias", "down", "down_bias")
    plain, sharded = ({name: tensors[name] for name in names} for tensors in (plain, sharded))
    return compare(lambda **tensors: run_linears(transposed=transposed, **tensors), plain, sharded)


@pytest.mark.parametrize(
    ("name", "listed", "transposed"),
    [
        ("tokens", False, False),
        ("columns", False, True),
        ("columns", True, False),
        ("tokens and columns", False, False),
        pytest.param("columns and tokens", True, True, marks=pytest.mark.slow),
    ],
)
def test_linears_equal_one_process(pool, name, listed, transposed):
    for placements in pool.run(linears_on_rank, name, listed, transposed):
        assert placements == output_of(MESHES[name][1])


def run_adapted(x: Tensor, ids: Tensor, topk_weights: Tensor, transposed: bool, **parameters: list[Tensor]) -> Tensor:
    """As run_linears, with adapters."""
    first, first_bias, second, second_bias, *factors = parameters.values()
    order, offsets = OPS.route(ids, E)
    first_options, second_options = (K, False, True, first_bias, transposed), (1, True, True, second_bias, transposed)
    h = OPS.adapted_linear(x, *first, *factors[0], order, offsets, 0.5, *first_options)
    rows = OPS.adapted_linear(torch.tanh(h), *second, *factors[1], order, offsets, 2.0, *second_options)
    return OPS.combine(rows, topk_weights, order, offsets, K, True)


def adapted_on_rank(name: str, transposed: bool) -> list[Placement]:
    torch.manual_seed(0)
    size, ways = MESHES[name]
    mesh = init_device_mesh("cpu", size)
    plain = mlp_tensors("plain", False, transposed)
    sharded = shard_mlp(plain, mesh, ways, transposed)
    names = ("x", "ids", "topk_weights", "gate_up", "gate_up_bias", "down", "down_bias")
    plain, sharded = ({name: tensors[name] for name in names} for tensors in (plain, sharded))
    for name in ("gate_up", "down"):
        _, rows, columns = plain[name][0].shape
        plain[f"factors of {name}"] = [normal(E, rows, 2), normal(E, 2, columns)]
        sharded[f"factors of {name}"] = [placed(t, mesh, ways, "nothing") for t in plain[f"factors of {name}"]]
    return compare(lambda **tensors: run_adapted(transposed=transposed, **tensors), plain, sharded)


@pytest.mark.parametrize(("name", "transposed"), [("tokens", False), ("columns", True), ("tokens and columns", False)])
def test_adapted_linears_equal_one_process(pool, name, transposed):
    for placements in pool.run(adapted_on_rank, name, transposed):
        assert placements == output_of(MESHES[name][1])


def some_need_no_gradient() -> None:
    """DTensor caches by placements and shapes: the same call with other flags must not get the first one's results."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for frozen in (("x", "down"), ("gate_up", "topk_weights"), ("gate_up_bias", "down_bias")):
        plain = mlp_tensors("plain", False, False)
        for name in frozen:
            for tensor in plain[name] if isinstance(plain[name], list) else [plain[name]]:
                tensor.requires_grad_(False)
        sharded = shard_mlp(plain, mesh, ("columns",), False)
        options = ("silu", "plain", False, "output")
        compare(lambda **tensors: run_mlp(**tensors, options=options), plain, sharded)  # noqa: B023


def test_flags_count_in_what_is_cached(pool):
    pool.run(some_need_no_gradient)


def error_of(call: Callable[[], Tensor]) -> str:
    """DTensor's dispatch makes a RuntimeError of a rule's ValueError, and adds the arguments after its text."""
    with pytest.raises(RuntimeError, match=r"accepted (are|is)|no rule") as error:
        call()
    return str(error.value)


def refusals() -> dict[str, str]:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    columns, experts = ("columns",), [Shard(0)]

    def message(layout: str = "separate", **changes: Any) -> str:
        plain = mlp_tensors(layout, False, False)
        sharded = shard_mlp(plain, mesh, columns, False)
        changed = {name: change(sharded[name], plain[name]) for name, change in changes.items()}
        return error_of(lambda: run_mlp(**(sharded | changed), options=("silu", layout, False, "output")))

    def linear(tokens: int, placements: list[Placement]) -> str:
        weight = distribute_tensor(torch.randn(E, F + 1, D), mesh, placements)
        ids = distribute_tensor(torch.zeros(tokens, 1, dtype=torch.int64), mesh, [Shard(0)])
        x = distribute_tensor(torch.randn(tokens, D), mesh, [R])
        return error_of(lambda: OPS.parallel_linear(x, [weight], *OPS.route(ids, E), 1, False, True, []))

    return {
        "columns without rows": message(down=lambda _, plain: [distribute_tensor(plain[0], mesh, [R])]),
        "experts": message(gate_up=lambda _, plain: [distribute_tensor(plain[0], mesh, experts)]),
        "concatenated": message("concatenated"),
        "tokens on the same dimension": message(ids=lambda _, plain: distribute_tensor(plain, mesh, [Shard(0)])),
        "uneven tokens": linear(WORLD_SIZE + 1, [R]),
        "both on one dimension": linear(WORLD_SIZE, [Shard(1)]),
        "experts of a linear": linear(WORLD_SIZE, experts),
    }


def test_anything_else_is_an_error_that_names_it(pool):
    for messages in pool.run(refusals):
        starts = {name: message.split(":")[0] for name, message in messages.items()}
        assert starts == {
            "columns without rows": "gate_up, up, down",
            "experts": "gate_up",
            "concatenated": "gate_up",
            "tokens on the same dimension": "gate_up",
            "uneven tokens": "topk_ids",
            "both on one dimension": "weight",
            "experts of a linear": "weight",
        }
        assert "local_map" in messages["experts"] and "local_map" in messages["experts of a linear"]


def local_experts(x: Tensor, ids: Tensor, topk_weights: Tensor, *parameters: Tensor) -> Tensor:
    """One expert a rank: ids count from it, and the ranks' results add up."""
    order, offsets = OPS.route(ids - torch.distributed.get_rank(), 1)
    weights, biases = [[tensor] for tensor in parameters[:2]], [[tensor] for tensor in parameters[2:]]
    (gate_up, down), (gate_up_bias, down_bias) = weights, biases
    return OPS.mlp(
        x, topk_weights, order, offsets, gate_up, [], down, gate_up_bias, [], down_bias, "silu", "concatenated"
    )


def experts_by_local_map() -> None:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    x, ids, topk_weights = normal(T, D), torch.rand(T, WORLD_SIZE).argsort(1)[:, :K], normal(T, K)
    sizes = ((2 * F, D), (D, F), (2 * F,), (D,))
    parameters = [normal(WORLD_SIZE, *size) for size in sizes]
    plain = {"x": x, "ids": ids, "topk_weights": topk_weights, "parameters": parameters}
    sharded = {name: placed(plain[name], mesh, ("nothing",), "tokens") for name in ("x", "ids", "topk_weights")}
    sharded["parameters"] = [placed(tensor, mesh, ("experts",), "experts") for tensor in parameters]
    mapped = local_map(
        local_experts,
        out_placements=[Partial()],
        in_placements=(*[[R]] * 3, *[[Shard(0)]] * 4),
        in_grad_placements=([Partial()], [R], [Partial()], *[[Shard(0)]] * 4),
        device_mesh=mesh,
    )

    def run(x: Tensor, ids: Tensor, topk_weights: Tensor, parameters: list[Tensor]) -> Tensor:
        if isinstance(x, DTensor):
            return mapped(x, ids, topk_weights, *parameters)
        gate_up, down, gate_up_bias, down_bias = ([tensor] for tensor in parameters)
        order, offsets = OPS.route(ids, WORLD_SIZE)
        return OPS.mlp(
            x, topk_weights, order, offsets, gate_up, [], down, gate_up_bias, [], down_bias, "silu", "concatenated"
        )

    assert compare(run, plain, sharded) == [Partial()]


def test_experts_that_are_sharded_go_through_local_map(pool):
    pool.run(experts_by_local_map)
