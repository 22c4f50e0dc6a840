"""What a trace has shown of routers so far: whether there is one, and of how many experts each chooses."""

from collections.abc import Iterable

from torch import fx

from fx_passes.graph.ops import arg, example, fake_tensor, op_name

_CHOICES = frozenset(("topk", "one_hot", "argmax", "max", "sort", "argsort"))


class Routers:
    def __init__(self) -> None:
        self.seen = False
        self.widths: set[int] = set()

    def note(self, nodes: Iterable[fx.Node]) -> None:
        """Take in the nodes that are routers'."""
        widths = {_width(node) for node in nodes if _chooses(node)}
        self.seen = self.seen or bool(widths)
        self.widths |= widths


def _chooses(node: fx.Node) -> bool:
    """Whether `node` is a choice among classes; `max` is one along a dim alone."""
    name = op_name(node)
    return name in _CHOICES and (name != "max" or isinstance(example(node), tuple))


def _width(node: fx.Node) -> int:
    """Of how many classes `node` chooses; 0 where that isn't known."""
    classes, scores = arg(node, 1, "num_classes"), fake_tensor(arg(node, 0, "input"))
    if op_name(node) == "one_hot":
        return classes if type(classes) is int else 0
    width = scores.shape[-1] if scores is not None and scores.dim() else 0
    return width if type(width) is int else 0
