"""Gate and up of one parameter: two products of the same rows with its halves are one with all of it.

silu(x @ W[e][:F].T) * (x @ W[e][F:].T)              concatenated; by chunk, split, or W [E, 2, F, D] as well
silu(x @ W[e, ::2].T) * (x @ W[e, 1::2].T)           interleaved
"""

from dataclasses import replace

from fx_passes.body.values import PerExpert
from fx_passes.body.view_steps import Cut, Index, Reshape, takes_all


def joined(first: PerExpert, second: PerExpert, dim: int) -> tuple[str, PerExpert] | None:
    """(layout, the whole) where `first` and `second` are the halves of one parameter along `dim` of an expert's own."""
    kinds = (first.parameters, first.steps[:-1], first.transposed, first.leading)
    if kinds != (second.parameters, second.steps[:-1], second.transposed, 0) or not first.steps or not second.steps:
        return None
    last, other = first.steps[-1], second.steps[-1]
    if not isinstance(last, Index) or not isinstance(other, Index) or None in (*last.items, *other.items):
        return None
    place = dim + (first.stacked is not None)
    before, after = last.items[:place], last.items[place + 1 :]
    keeps_dims = len(before) == place and all(isinstance(item, Cut) for item in before)
    if not keeps_dims or (before, after) != (other.items[:place], other.items[place + 1 :]):
        return None
    whole = replace(first, steps=first.steps[:-1])
    size = whole.sizes[place]
    halves = last.items[place], other.items[place]
    items = (*before, Cut(0, size), *after)
    if not takes_all(items, whole.sizes):
        whole = replace(whole, steps=(*whole.steps, Index(items)))
    if size % 2 == 0 and halves in _cuts(size):
        return _cuts(size)[halves], whole
    if size != 2 or halves != (0, 1):
        return None
    sizes = whole.sizes
    merged = Reshape((*sizes[:place], 2 * sizes[place + 1], *sizes[place + 2 :]))
    return "concatenated", replace(whole, steps=(*whole.steps, merged))


def _cuts(size: int) -> dict[tuple[Cut, Cut], str]:
    """The layouts by the halves that they have."""
    return {
        (Cut(0, size // 2), Cut(size // 2, size)): "concatenated",
        (Cut(0, size, 2), Cut(1, size, 2)): "interleaved",
    }
