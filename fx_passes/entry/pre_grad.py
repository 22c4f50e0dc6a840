"""The second door: the same rewrite as a pass of Inductor, for programs that choose no backend."""

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

import registrations  # noqa: F401  (the ops must exist before a graph names them)
from fx_passes import faults
from fx_passes.cache_key import sources_hash
from fx_passes.entry import hook
from fx_passes.entry.backend import rewrite_graph


class PreGradPass(CustomGraphPass):
    """Rewrites what is proven in the graphs that Inductor gets, as one of its passes.

    torch._inductor.config.pre_grad_custom_pass = scatter_moe.pre_grad_pass

    Dynamo traces by itself here: a loop that breaks its graphs never arrives whole, unless its model is prepared.

    Args:
        graph: rewritten in place.
    """

    def __call__(self, graph: fx.Graph) -> None:
        gm = graph.owning_module
        if hook.current_capture() is not None or not isinstance(gm, fx.GraphModule):
            return  # what was captured for our backend, or of a prepared model, was rewritten before it came here
        if _rewrite_or_restore(gm) and not _KEYED_BY_UUID:
            _tell_caches_apart()

    def uuid(self) -> str:
        """PyTorch's compile caches must miss when an operator, a kernel or the rewrite changes."""
        return sources_hash()


def _rewrite_or_restore(gm: fx.GraphModule) -> bool:
    """Nobody traces again after a fault of ours, as in the backend: the graph becomes what it was."""
    before = _copy(gm.graph)
    try:
        return rewrite_graph(gm)
    except Exception as error:
        if faults.are_raised():
            raise
        faults.warn_of(error)
        gm.graph = before
        return False


def _copy(graph: fx.Graph) -> fx.Graph:
    """`graph` anew, whose inputs say where they come from, as Dynamo's do."""
    copy, copies = fx.Graph(), {}
    copy.output(copy.graph_copy(graph, copies))
    for node in graph.find_nodes(op="placeholder"):
        if hasattr(node, _SOURCE):
            setattr(copies[node], _SOURCE, getattr(node, _SOURCE))
    return copy


_SOURCE = "_dynamo_source"
_KEYED_BY_UUID = hasattr(inductor_config, "pre_grad_pass_timing")


def _tell_caches_apart() -> None:
    """Older PyTorch looks the rewritten graph up and knows nothing of the pass: from now on the tag names us."""
    tag = torch.compiler.config.cache_key_tag
    if sources_hash() not in tag:
        torch.compiler.config.cache_key_tag = f"{tag} scatter_moe {sources_hash()}"


pre_grad_pass = PreGradPass()
