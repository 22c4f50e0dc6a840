"""On a GPU every router decides as on the CPU."""

import copy

import pytest
import torch

from tests.numerics import assert_exact
from tests.routers.test_compile import ROUTERS, D, Losses, step

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS.keys())
def test_a_step_on_the_gpu_is_that_of_the_cpu(make):
    torch.manual_seed(0)
    on_cpu = Losses(make()).double().eval()  # float64: no rounding may swap two experts; each device has its own noise
    for parameter in on_cpu.parameters():
        torch.nn.init.normal_(parameter)  # noisy top-k starts at zero, where every choice is a tie
    on_gpu = copy.deepcopy(on_cpu).cuda()
    x = torch.randn(512, D, dtype=torch.float64)
    ids, results = step(on_gpu, list(on_gpu.parameters()), x.cuda())
    expected_ids, expected = step(on_cpu, list(on_cpu.parameters()), x)
    assert torch.equal(ids.cpu(), expected_ids)
    results = {name: None if tensor is None else tensor.cpu() for name, tensor in results.items()}
    assert_exact(results, expected, torch.float64)
