"""A rewritten program in odd surroundings does what eager does: odd gradients, NaN, functional calls, other threads."""

import threading

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.func import functional_call, grad, stack_module_state, vmap

from tests.backend.harness import assert_close, assert_same, compile_ours, fresh_dynamo, observe, rewritten
from tests.zoo import ZOO, hidden_states
from tests.zoo.bodies import HitLoop, RangeLoop
from tests.zoo.case import Case
from tests.zoo.common import TOKENS, D
from tests.zoo.stacked import StackedBlock
from tests.zoo.starts import ReluFirst

CASES = (Case("hit", HitLoop), Case("stacked", StackedBlock))

TRANSFORMABLE = [case for case in ZOO if case.name in ("dense_einsum", "gathered_einsum", "dense_modules_sum")]

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    fresh_dynamo()


def pair(case, inner="counting_aot_eager"):
    """Eager and compiled twins: (module, call) each."""
    eager, module = case.make(), case.make()
    return (eager, output_of(eager)), (module, output_of(compile_ours(module, inner, fullgraph=True)))


def output_of(call):
    def first(*args):
        out = call(*args)
        return out[0] if isinstance(out, tuple) else out

    return first


def grads(module, x):
    return {"x": x.grad, **{name: parameter.grad for name, parameter in module.named_parameters()}}


def assert_same_grads(ours, eager):
    for name, expected in eager.items():
        zeros = torch.zeros_like(expected) if expected is not None else torch.zeros_like(ours[name])
        assert_close(*(zeros if g is None else g for g in (ours[name], expected)), name)


@each_case
def test_expanded_upstream_gradient(case):
    """sum() and mean() send back a gradient whose strides are zero; without AOTAutograd our operators get it so."""
    seen = []
    for module, call in pair(case, "counting_eager"):
        x = hidden_states()
        out = call(x)
        out.backward(torch.tensor(0.7).expand(out.shape))
        seen.append(grads(module, x))
    assert rewritten() == 1
    assert_same_grads(*reversed(seen))


@each_case
def test_token_of_nan_spoils_what_its_experts_touch(case):
    """A row of NaN spoils its own row, as in eager; other tokens stay what they were."""
    spoiled = 5
    (_, eager), (_, ours) = pair(case)
    clean, x = hidden_states(requires_grad=False), hidden_states(requires_grad=False)
    x.view(-1, D)[spoiled] = float("nan")
    others = [token for token in range(TOKENS) if token != spoiled]
    expected = eager(clean).reshape(-1, D)[others]
    for call in (eager, ours):
        rows = call(x).reshape(-1, D)
        assert rows[spoiled].isnan().all()
        assert_close(rows[others], expected, "other tokens")
    assert rewritten() == 1


@each_case
def test_gradients_beside_a_token_of_nan(case):
    """Its experts' weights have NaN gradients; experts that it does not reach, and other tokens, have eager's."""
    seen = []
    for module, call in pair(case):
        x = hidden_states()
        with torch.no_grad():
            x.view(-1, D)[5] = float("nan")
        call(x).square().sum().backward()
        seen.append(grads(module, x))
    theirs, ours = seen
    for name, expected in theirs.items():
        if expected is None:
            assert not ours[name].any(), name
            continue
        assert torch.equal(ours[name].isnan(), expected.isnan()), name
        assert_close(ours[name].nan_to_num(), expected.nan_to_num(), name)


@each_case
def test_optimizer_step_between_forward_and_backward_raises(case):
    for module, call in pair(case):
        x = hidden_states()
        loss = call(x).sum()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert rewritten() == 1


def test_experts_added_to_what_a_derivative_reads_raise():
    module = ReluFirst()
    for call in (module, compile_ours(module)):
        loss = call(hidden_states()).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@each_case
def test_functional_call(case):
    """Other parameters than the module's own, and their gradients."""
    eager, module = case.make(), case.make()
    compiled = compile_ours(lambda parameters, x: functional_call(module, parameters, (x,)), fullgraph=True)
    other = case.make(seed=1)
    theirs = {name: parameter.detach().clone().requires_grad_() for name, parameter in other.named_parameters()}
    ours = {name: parameter.detach().clone().requires_grad_() for name, parameter in other.named_parameters()}
    out = output_of(compiled)(ours, hidden_states(requires_grad=False))
    expected = output_of(lambda p, x: functional_call(eager, p, (x,)))(theirs, hidden_states(requires_grad=False))
    assert rewritten() == 1
    assert_close(out, expected, "output")
    for result in (out, expected):
        result.square().sum().backward()
    assert_same_grads({n: p.grad for n, p in ours.items()}, {n: p.grad for n, p in theirs.items()})
    assert all(parameter.grad is None for parameter in module.parameters())


def over_models(case):
    """(functional call of a block, stacked parameters and inputs of two)."""
    base, models = case.make(), [case.make(seed=seed) for seed in range(2)]
    x = torch.stack([hidden_states(seed=seed, requires_grad=False) for seed in range(2)])
    return lambda parameters, x: functional_call(base, parameters, (x,)), stack_module_state(models)[0], x


@each_case
def test_vmap_over_a_loop_fails_as_in_eager(case):
    """nonzero() has no batching rule."""
    call, parameters, x = over_models(case)
    for target in (vmap(call), compile_ours(vmap(call))):
        with pytest.raises(RuntimeError, match="vmap: We do not support batching operators that can output dynamic"):
            target(parameters, x)


@pytest.mark.parametrize("in_dims", [(0, 0), (None, 0)], ids=["models", "inputs"])
@pytest.mark.parametrize("case", TRANSFORMABLE, ids=lambda case: case.name)
def test_vmap_over_a_form_without_loop(case, in_dims):
    """What runs under vmap in eager runs compiled: it is left alone, since our operators have no batching rules."""
    call, parameters, x = over_models(case)
    parameters = parameters if in_dims[0] == 0 else dict(case.make().named_parameters())
    compiled = compile_ours(vmap(call, in_dims), inner="counting_eager")
    assert_close(compiled(parameters, x), vmap(call, in_dims)(parameters, x), "output")
    assert rewritten() == 0


@pytest.mark.parametrize("case", TRANSFORMABLE, ids=lambda case: case.name)
def test_gradient_by_a_transform(case):
    call, _, x = over_models(case)
    by_transform = grad(lambda parameters, x: call(parameters, x).square().sum())
    parameters = dict(case.make().named_parameters())
    ours = compile_ours(by_transform, inner="counting_eager")(parameters, x[0])
    assert_same_grads(ours, by_transform(parameters, x[0]))
    assert rewritten() == 0


@each_case
def test_forward_mode(case):
    """The loop is left alone, also where it was rewritten before."""
    eager, compiled = output_of(case.make()), output_of(compile_ours(case.make()))
    x = hidden_states(requires_grad=False)
    with torch.no_grad():
        compiled(x)
        assert rewritten() == 1
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            ours, expected = (forward_ad.unpack_dual(call(dual)).tangent for call in (compiled, eager))
            assert_close(ours, expected, "tangent")
    assert rewritten() == 1


@each_case
def test_logits_of_nan(case):
    """A router whose weights are NaN for one expert spoils all tokens, as in eager."""
    for module, call in pair(case):
        router = next(parameter for name, parameter in module.named_parameters() if "gate" in name)
        assert router.shape[1] == D
        with torch.no_grad():
            router[0].fill_(float("nan"))
        assert call(hidden_states()).isnan().all()
    assert rewritten() == 1


@each_case
def test_made_on_the_meta_device(case):
    """Shapes alone on meta; then storage, weights and a compile."""
    eager = case.make()
    with torch.device("meta"):
        module = case.block()
    out = compile_ours(module, fullgraph=True)(hidden_states(requires_grad=False).to("meta"))
    first = out[0] if isinstance(out, tuple) else out
    assert first.is_meta and first.shape == hidden_states().shape
    module = module.to_empty(device="cpu")
    module.load_state_dict(eager.state_dict())
    fresh_dynamo()
    assert_same(observe(compile_ours(module), module, hidden_states()), observe(eager, eager, hidden_states()))
    assert rewritten() == 1


@each_case
def test_compiled_autograd(case):
    seen = []
    for (module, call), surroundings in zip(
        pair(case), (None, torch.compile(backend="counting_aot_eager")), strict=True
    ):
        x = hidden_states()
        loss = call(x).square().sum()
        if surroundings is None:
            loss.backward()
        else:
            with compiled_autograd._enable(surroundings):
                loss.backward()
        seen.append(grads(module, x))
    assert rewritten() == 1
    assert_same_grads(*reversed(seen))


@each_case
def test_deterministic_algorithms(case):
    """Nothing raises, and two runs are the same to the bit."""
    torch.use_deterministic_algorithms(True)
    try:
        (eager, _), (module, call) = pair(case)
        runs = [observe(call, module, hidden_states()) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    expected = observe(output_of(eager), eager, hidden_states())
    assert_same(runs[0], expected)
    assert torch.equal(runs[0].outputs[0], runs[1].outputs[0])
    for name, gradient in runs[0].grads.items():
        assert torch.equal(gradient, runs[1].grads[name]), name


def test_more_slots_than_int32_holds_is_an_error():
    """Told by the operator, before anything of that size is made."""
    tokens = 2**30
    ids = torch.zeros(1, 1, dtype=torch.int64).expand(tokens, 2)
    with pytest.raises(ValueError, match=r"topk_ids.*2147483648 slots.*2147483647"):
        torch.ops.scatter_moe.route(ids, 4)


def test_two_threads_compile_at_once():
    """Each thread compiles and trains its own model; a third runs eager meanwhile."""
    cases = (Case("stacked", StackedBlock), Case("range", RangeLoop), Case("hit", HitLoop))
    expected = [observe(module, module, hidden_states()) for module in (case.make() for case in cases)]
    modules = [case.make() for case in cases]
    seen, ready = {}, threading.Barrier(len(cases))

    def work(number):
        call = modules[number] if number == 2 else compile_ours(modules[number])
        ready.wait()
        try:
            seen[number] = [observe_alone(call, modules[number]) for _ in range(2)]
        except Exception as error:  # noqa: BLE001  told by the assertion below
            seen[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, theirs in enumerate(expected):
        assert isinstance(seen[number], list), seen[number]
        for outputs, gradients in seen[number]:
            assert_close(outputs, theirs.outputs[0], "output")
            assert_same_grads(gradients, {n: g for n, g in theirs.grads.items() if n in gradients})
    assert rewritten() == 2


def observe_alone(call, module):
    """As `observe`, without the global random state that threads share."""
    module.zero_grad(set_to_none=True)
    x = hidden_states()
    out = output_of(call)(x)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    out.backward(upstream)
    return out.detach(), {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
