"""Compile caches must miss when an op, a kernel, a backward formula or the rewrite itself changes.

AOTAutograd and Inductor key their caches by the graph, which names our ops but doesn't hold their derivatives. So the
key of a graph with our ops carries a hash of our own sources too.
"""

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

_PACKAGES = ("fx_passes", "registrations", "scatter_ops")


@functools.cache
def sources_hash() -> str:
    """A hash of all sources and tuning files that a compiled graph may depend on."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(str(path.relative_to(root)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


@contextmanager
def caches_keyed_by_sources(gm: fx.GraphModule) -> Iterator[None]:
    """Within it PyTorch's compile caches also tell our versions apart, where `gm` holds an op of ours.

    The user's own tag stays in force.
    """
    if not any(_holds_ours(part.graph) for part in gm.modules() if isinstance(part, fx.GraphModule)):
        yield
        return
    tag = torch.compiler.config.cache_key_tag
    with torch.compiler.config.patch(cache_key_tag=f"{tag} scatter_moe {sources_hash()}"):
        yield


def _holds_ours(graph: fx.Graph) -> bool:
    operators = (node.target for node in graph.nodes if isinstance(node.target, (OpOverload, OpOverloadPacket)))
    return any(str(operator).startswith("scatter_moe.") for operator in operators)
