"""The one place where Dynamo is extended.

Dynamo traces a frame instruction by instruction in `InstructionTranslatorBase.step`, calls in `call_function` of the
same class, and hands the graph over in `OutputGraph.call_user_compiler`. The wrappers below leave every frame alone
whose compiler is not our backend and that holds no prepared model. Where a symbol is missing (another PyTorch),
`install` says so once: then naive loops that Dynamo cannot trace by itself stay eager, and `prepare` has no effect.

`OutputGraph.add_fqn_info_for_inlined_modules` is extended to save time; without it nothing else is lost.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import config, output_graph, symbolic_convert

from fx_passes.cache_key import caches_keyed_by_sources
from fx_passes.capture import Capture
from fx_passes.entry.prepared import holds_prepared, without_hook

log = logging.getLogger("scatter_moe")

_CAPTURE = "scatter_moe_capture"
_ORIGINAL = "scatter_moe_original"
_REWRITTEN = "scatter_moe_rewritten"
_UNKNOWN: Any = object()


def install(
    is_ours: Callable[[Any], bool], gets_whole_graphs: Callable[[Any], bool], rewrite: Callable[[Any], Any]
) -> bool:
    """Extends Dynamo once.

    Args:
        is_ours: tells whether a compiler function is our backend.
        gets_whole_graphs: tells whether it is our backend, which rewrites by itself, and nothing cuts graphs before it.
        rewrite: rewrites a graph in place; used for prepared models under other backends and for graphs to be cut.

    Returns:
        Whether this PyTorch has what is extended.
    """
    translator = getattr(symbolic_convert, "InstructionTranslatorBase", None)
    graph = getattr(output_graph, "OutputGraph", None)
    extended = ((translator, "step"), (translator, "call_function"), (graph, "call_user_compiler"))
    if translator is None or not all(hasattr(owner, name) for owner, name in extended):
        log.warning(
            "PyTorch %s: Dynamo can't be extended, so loops that it does not trace by itself stay as they are; "
            'scatter_moe.prepare(model) and then backend="scatter_moe" rewrite those over range(E)',
            torch.__version__,
        )
        without_hook()
        return False
    if not hasattr(translator.step, _ORIGINAL):
        _extend_step(translator, is_ours)
        _extend_call_function(translator)
        _extend_call_user_compiler(graph, gets_whole_graphs, rewrite)
        _extend_names_of_parameters(graph)
    return True


def _extend_step(translator: Any, is_ours: Callable[[Any], bool]) -> None:
    original = translator.step

    @functools.wraps(original)
    def step(self: Any) -> bool:
        capture = _capture_of(self, is_ours)
        return original(self) if capture is None else capture.step(self, original)

    setattr(step, _ORIGINAL, original)
    translator.step = step


def _extend_call_function(translator: Any) -> None:
    original = translator.call_function

    @functools.wraps(original)
    def call_function(self: Any, fn: Any, args: Any, kwargs: Any) -> None:
        capture = getattr(self.output, _CAPTURE, None)
        result = capture.call(self, fn, args, kwargs) if capture is not None else None
        if result is None:
            original(self, fn, args, kwargs)
        else:
            self.push(result)

    translator.call_function = call_function


def _extend_call_user_compiler(
    graph: Any, gets_whole_graphs: Callable[[Any], bool], rewrite: Callable[[Any], Any]
) -> None:
    original = graph.call_user_compiler

    @functools.wraps(original)
    def call_user_compiler(self: Any, gm: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, _CAPTURE, None) is None or gets_whole_graphs(self.compiler_fn):
            return original(self, gm, *args, **kwargs)
        rewrite(gm)
        setattr(self, _REWRITTEN, True)
        with caches_keyed_by_sources(gm):
            return original(self, gm, *args, **kwargs)

    graph.call_user_compiler = call_user_compiler


def _extend_names_of_parameters(graph: Any) -> None:
    """Frames of ours do without the names of parameters, which only exporters read.

    For each module that Dynamo meets it notes those of all parameters below: of an expert's once for the model, once
    for the list of layers, once for its layer and once for its list, whether or not the graph reads it.
    """
    original = getattr(graph, "add_fqn_info_for_inlined_modules", None)
    if original is None:
        return

    @functools.wraps(original)
    def add_names(self: Any, *args: Any, **kwargs: Any) -> None:
        is_exported = self.export or config.install_free_tensors
        if is_exported or getattr(self, _CAPTURE, None) is None:
            original(self, *args, **kwargs)

    graph.add_fqn_info_for_inlined_modules = add_names


def current_capture() -> Capture | None:
    """The capture of the frame that is being traced in this thread."""
    tx = getattr(symbolic_convert.tls, "current_tx", None)
    return getattr(tx.output, _CAPTURE, None) if tx is not None else None


@torch.compiler.assume_constant_result
def is_captured() -> bool:
    """Whether the frame that is being traced, if any, is one that naive loops are looked for in."""
    return current_capture() is not None


def is_rewritten() -> bool:
    """Whether the graph of the frame that is being traced in this thread was rewritten before the backend got it."""
    tx = getattr(symbolic_convert.tls, "current_tx", None)
    return tx is not None and getattr(tx.output, _REWRITTEN, False)


def _capture_of(tx: Any, is_ours: Callable[[Any], bool]) -> Capture | None:
    output = tx.output
    capture = getattr(output, _CAPTURE, _UNKNOWN)  # asked at each instruction of every frame, whoever compiles it
    if capture is _UNKNOWN:
        wanted = is_ours(output.compiler_fn) or holds_prepared(tx.f_locals.values())
        capture = Capture(output) if wanted else None
        setattr(output, _CAPTURE, capture)
    return capture
