"""mode, options, dynamic and the inner backend mean what they mean to stock torch.compile."""

import pytest
import torch
import torch._inductor.compile_fx
from torch._dynamo.backends.registry import list_backends
from torch._inductor import config as inductor_config

from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, graphs, observe, rewritten
from tests.zoo import hidden_states
from tests.zoo.bodies import RangeLoop
from tests.zoo.case import Case
from tests.zoo.stacked import StackedBlock

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
CASE = Case("stacked", StackedBlock)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    fresh_dynamo()


@pytest.fixture
def seen_configs(monkeypatch):
    """Inductor replaced by a stub that notes the configuration which it would have compiled under."""
    seen = []

    def note(gm, _example_inputs, config_patches=None, **_kwargs):
        with inductor_config.patch(config_patches or {}):
            seen.append(inductor_config.get_config_copy())
        return gm.forward

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", note)
    return seen


def linear():
    return torch.nn.Linear(4, 4)


def configs_of(seen, **how):
    torch._dynamo.reset()
    seen.clear()
    torch.compile(linear(), **how)(torch.randn(2, 4))
    assert len(seen) == 1
    return seen[0]


@pytest.mark.parametrize("mode", MODES)
def test_mode_gives_the_configuration_of_stock(seen_configs, mode):
    stock = configs_of(seen_configs, backend="inductor", mode=mode)
    assert configs_of(seen_configs, backend="scatter_moe", mode=mode) == stock


def test_default_gives_the_configuration_of_stock(seen_configs):
    assert configs_of(seen_configs, backend="scatter_moe") == configs_of(seen_configs, backend="inductor")


@pytest.mark.parametrize("options", [{"max_autotune": True}, {"epilogue_fusion": False, "triton.cudagraphs": True}])
def test_inductor_options_are_handed_on(seen_configs, options):
    stock = configs_of(seen_configs, backend="inductor", options=options)
    assert configs_of(seen_configs, backend="scatter_moe", options=options) == stock


def test_unknown_option_raises():
    with pytest.raises(Exception, match="no_such_option"):
        torch.compile(linear(), backend="scatter_moe", options={"no_such_option": 1})(torch.randn(2, 4))


def test_unknown_mode_raises():
    with pytest.raises(Exception, match="no-such-mode"):
        torch.compile(linear(), backend="scatter_moe", mode="no-such-mode")(torch.randn(2, 4))


def test_unknown_inner_backend_raises():
    with pytest.raises(Exception, match="no_such_backend"):
        compile_ours(linear(), inner="no_such_backend")(torch.randn(2, 4))


@pytest.mark.parametrize("inner", ["scatter_moe", None])
def test_inner_backend_that_is_none_or_this_one_raises(inner):
    with pytest.raises(Exception, match=f"inner_backend: got {inner!r}"):
        compile_ours(linear(), inner=inner)(torch.randn(2, 4))


def test_mode_and_options_together_raise_as_in_stock():
    with pytest.raises(RuntimeError, match="mode or options"):
        torch.compile(linear(), backend="scatter_moe", mode="default", options={"inner_backend": "eager"})


def test_backend_is_registered():
    assert "scatter_moe" in list_backends()


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "counting_eager", "aot_eager_decomp_partition"])
def test_inner_backend_is_selected(inner):
    eager, module = CASE.make(), CASE.make()
    compiled = compile_ours(module, inner=inner, fullgraph=True)
    assert_same(observe(compiled, module, hidden_states()), observe(eager, eager, hidden_states()))
    assert rewritten() == 1
    assert len(graphs) == (inner == "counting_eager")


@pytest.mark.parametrize("dynamic", [True, False, None])
def test_dynamic_is_handed_on(dynamic):
    """As many graphs for three lengths as a dense layer has."""

    def count(module, **how):
        fresh_dynamo()
        compiled = torch.compile(module, dynamic=dynamic, **how)
        for tokens in (24, 32, 40):
            compiled(hidden_states(tokens))
        return len(graphs)

    dense = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.GELU(), torch.nn.Linear(24, 16))
    expected = count(dense, backend="counting_eager")
    for block in (StackedBlock, RangeLoop):
        module = Case("block", block).make()
        options = {"inner_backend": "counting_eager"}
        assert count(module, backend="scatter_moe", options=options) == expected
