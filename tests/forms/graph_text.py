"""A captured graph as short text: one line a node, without types and positions, stable across PyTorch versions."""

import functools

import torch
from torch import fx
from torch.fx.node import map_arg

import scatter_moe  # noqa: F401  (extends Dynamo)
from fx_passes.entry.backend import backend_for_report


def rewritten_graph(module, *inputs) -> str:
    """The graph that `module` becomes, after the rewrite."""
    graphs: list[fx.GraphModule] = []
    rewrite_only = backend_for_report()

    @functools.wraps(rewrite_only)
    def keep(gm, example_inputs):
        compiled = rewrite_only(gm, example_inputs)
        graphs.append(gm)
        return compiled

    torch.compile(module, backend=keep, fullgraph=True)(*inputs)
    assert len(graphs) == 1
    return graph_text(graphs[0].graph)


def graph_text(graph: fx.Graph) -> str:
    names: dict[fx.Node, str] = {}
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = _short(node.name)
            continue
        names[node] = f"v{len(names)}"
        arguments = [_show(argument, names) for argument in node.args]
        arguments += [f"{key}={_show(value, names)}" for key, value in node.kwargs.items()]
        target = "return" if node.op == "output" else _target(node)
        lines.append(
            f"{names[node]} = {target}({', '.join(arguments)})" if node.op != "output" else f"return {arguments[0]}"
        )
    return "\n".join(lines)


def _target(node: fx.Node) -> str:
    if node.op == "call_method" and node.target == "__eq__":
        return "eq"  # torch 2.11 and 2.13 record `a == b` differently
    if node.op == "call_method":
        return f".{node.target}"
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def _show(argument, names) -> str:
    if isinstance(argument, fx.Node):
        return names[argument]
    if isinstance(argument, list | tuple):
        shown = ", ".join(_show(item, names) for item in argument)
        return f"[{shown}]" if isinstance(argument, list) else f"({shown})"
    return str(map_arg(argument, lambda node: names[node]))


def _short(name: str) -> str:
    """`l_self_modules_experts_modules_0_modules_up_parameters_weight_` as `experts_0_up_weight`."""
    words = [word for word in name.strip("_").split("_") if word not in ("l", "self", "modules", "parameters", "")]
    return "_".join(words)
