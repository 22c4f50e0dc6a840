"""The graph that each form is rewritten to, pinned.

`make goldens` accepts a change; read the diff before committing it.
"""

import pytest
import torch

expecttest = pytest.importorskip("expecttest", reason="goldens are pinned with expecttest, which is not installed here")

from tests.forms.graph_text import rewritten_graph  # noqa: E402
from tests.zoo import ZOO, hidden_states  # noqa: E402

CASES = {case.name: case for case in ZOO}


class Goldens(expecttest.TestCase):
    maxDiff = None

    def setUp(self):
        torch._dynamo.reset()

    def golden(self, name: str) -> str:
        return rewritten_graph(CASES[name].make(), hidden_states())

    def test_range_loop(self):
        self.assertExpectedInline(
            self.golden("mixtral_445"),
            """\
v14 = .view(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=1, dtype=torch.float32)
v17 = topk(v16, 2, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = .sum(v18, dim=-1, keepdim=True)
v21 = itruediv(v18, v20)
v22 = .to(v21, torch.float32)
v23 = scatter_moe.route(v19, 4)
v24 = getitem(v23, 0)
v25 = getitem(v23, 1)
v26 = scatter_moe.mlp(v14, v22, v24, v25, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v27 = .reshape(v26, 2, 12, 16)
return (v27, v15)""",
        )

    def test_experts_without_parameters(self):
        self.assertExpectedInline(
            self.golden("hit_identity_experts"),
            """\
v4 = .view(hidden_states, -1, 16)
v5 = .reshape(v4, -1, 16)
v6 = linear(v5, gate_weight)
v7 = softmax(v6, dtype=torch.float32, dim=-1)
v8 = topk(v7, 3, dim=-1)
v9 = getitem(v8, 0)
v10 = getitem(v8, 1)
v11 = .sum(v9, dim=-1, keepdim=True)
v12 = itruediv(v9, v11)
v13 = .to(v12, torch.float32)
v14 = scatter_moe.route(v10, 4)
v15 = getitem(v14, 0)
v16 = getitem(v14, 1)
v17 = getitem(experts_gate_up_proj, (slice(0, 4, 1)))
v18 = scatter_moe.mlp(v4, v13, v15, v16, [v17], [], [experts_down_proj], [], [], [], silu, concatenated, False, output, 1.702, 7.0, torch.float32)
v19 = sub(v10, 4)
v20 = scatter_moe.route(v19, 4)
v21 = getitem(v20, 0)
v22 = getitem(v20, 1)
v23 = scatter_moe.dispatch(v4, v21, v22, 3)
v24 = scatter_moe.combine(v23, v13, v21, v22, 3, True, torch.float32)
v25 = add(v18, v24)
v26 = .reshape(v25, (2, 12, 16))
return (v26)""",
        )

    def test_sorted_segments(self):
        self.assertExpectedInline(
            self.golden("segments_array"),
            """\
v14 = .reshape(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=1, dtype=torch.float32)
v17 = topk(v16, 2, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = .sum(v18, dim=-1, keepdim=True)
v21 = itruediv(v18, v20)
v22 = .to(v21, torch.float32)
v23 = .new_zeros(v19, (24, 4))
v24 = .scatter_(v23, 1, v19, 1)
v25 = scatter_moe.route(v19, 4)
v26 = getitem(v25, 0)
v27 = getitem(v25, 1)
v28 = scatter_moe.mlp(v14, v22, v26, v27, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v29 = .view(v28, (2, 12, 16))
return (v29)""",
        )

    def test_segments(self):
        self.assertExpectedInline(
            self.golden("segments_residual"),
            """\
v14 = .reshape(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=1, dtype=torch.float32)
v17 = topk(v16, 2, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = .sum(v18, dim=-1, keepdim=True)
v21 = itruediv(v18, v20)
v22 = .to(v21, torch.float32)
v23 = .view(v19, -1)
v24 = .argsort(v23)
v25 = floordiv(v24, 2)
v26 = getitem(v14, v25)
v27 = scatter_moe.route(v19, 4)
v28 = getitem(v27, 0)
v29 = getitem(v27, 1)
v30 = .size(v28, 0)
v31 = arange(v30, dtype=torch.int32, device=cpu)
v32 = .reshape(v31, (-1, 1))
v33 = ones_like(v32, dtype=torch.float32)
v34 = scatter_moe.mlp(v26, v33, v31, v29, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v35 = .view(v22, -1)
v36 = getitem(v35, v24)
v37 = .unsqueeze(v36, -1)
v38 = mul(v34, v37)
v39 = floordiv(v24, 2)
v40 = .index_add(v14, 0, v39, v38)
v41 = .view(v40, (2, 12, 16))
return (v41)""",
        )

    def test_segments_of_linear_layers(self):
        self.assertExpectedInline(
            self.golden("segments_projections"),
            """\
v4 = .reshape(hidden_states, -1, 16)
v5 = linear(v4, router_layer_weight, None)
v6 = .float(v5)
v7 = .topk(v6, 2, dim=1)
v8 = getitem(v7, 0)
v9 = getitem(v7, 1)
v10 = softmax(v8, dim=1)
v11 = .type_as(v10, v4)
v12 = .flatten(v9)
v13 = .sort(v12, 0)
v14 = getitem(v13, 1)
v15 = .div(v14, 2, rounding_mode=trunc)
v16 = .flatten(v11)
v17 = getitem(v16, v14)
v18 = getitem(v4, v15)
v19 = scatter_moe.route(v9, 4)
v20 = getitem(v19, 0)
v21 = getitem(v19, 1)
v22 = .size(v20, 0)
v23 = arange(v22, dtype=torch.int32, device=cpu)
v24 = scatter_moe.parallel_linear(v18, [input_linear_weight], v23, v21, 1, True, True, [], False)
v25 = zeros((48, 24), dtype=torch.float32, device=cpu)
v26 = .index_add(v25, 0, v14, v24)
v27 = .view(v26, -1, 2, 24)
v28 = normalize(v27, dim=-1)
v29 = .mean(v27, 1, keepdim=True)
v30 = add(v28, v29)
v31 = .reshape(v30, -1, 24)
v32 = getitem(v31, v14)
v33 = scatter_moe.route(v9, 4)
v34 = getitem(v33, 0)
v35 = getitem(v33, 1)
v36 = .size(v34, 0)
v37 = arange(v36, dtype=torch.int32, device=cpu)
v38 = scatter_moe.parallel_linear(v32, [output_linear_weight], v37, v35, 1, True, True, [], False)
v39 = getitem(v17, (slice(None, None, None), None))
v40 = mul(v38, v39)
v41 = zeros((24, 16), dtype=torch.float32, device=cpu)
v42 = .index_add(v41, 0, v15, v40)
v43 = .view(v42, (2, 12, 16))
return (v43)""",
        )

    def test_range_loop_over_segments(self):
        self.assertExpectedInline(
            self.golden("segments_of_slots"),
            """\
v14 = .reshape(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=1, dtype=torch.float32)
v17 = topk(v16, 2, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = .sum(v18, dim=-1, keepdim=True)
v21 = itruediv(v18, v20)
v22 = .to(v21, torch.float32)
v23 = scatter_moe.route(v19, 4)
v24 = getitem(v23, 0)
v25 = getitem(v23, 1)
v26 = scatter_moe.mlp(v14, v22, v24, v25, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v27 = .view(v26, (2, 12, 16))
return (v27)""",
        )

    def test_range_loop_with_guard(self):
        self.assertExpectedInline(
            self.golden("any_guard"),
            """\
v14 = .reshape(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=1, dtype=torch.float32)
v17 = topk(v16, 2, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = .sum(v18, dim=-1, keepdim=True)
v21 = itruediv(v18, v20)
v22 = .to(v21, torch.float32)
v23 = eq(v19, 0)
v24 = .any(v23)
v25 = eq(v19, 1)
v26 = .any(v25)
v27 = eq(v19, 2)
v28 = .any(v27)
v29 = eq(v19, 3)
v30 = .any(v29)
v31 = scatter_moe.route(v19, 4)
v32 = getitem(v31, 0)
v33 = getitem(v31, 1)
v34 = scatter_moe.mlp(v14, v22, v32, v33, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v35 = .view_as(v34, hidden_states)
return (v35)""",
        )

    def test_range_loop_over_stacked_weights(self):
        self.assertExpectedInline(
            self.golden("stacked_range"),
            """\
v4 = .view(hidden_states, -1, 16)
v5 = .reshape(v4, -1, 16)
v6 = linear(v5, gate_weight)
v7 = softmax(v6, dtype=torch.float32, dim=-1)
v8 = topk(v7, 2, dim=-1)
v9 = getitem(v8, 0)
v10 = getitem(v8, 1)
v11 = .sum(v9, dim=-1, keepdim=True)
v12 = itruediv(v9, v11)
v13 = .to(v12, torch.float32)
v14 = scatter_moe.route(v10, 4)
v15 = getitem(v14, 0)
v16 = getitem(v14, 1)
v17 = scatter_moe.mlp(v4, v13, v15, v16, [experts_gate_up_proj], [], [experts_down_proj], [], [], [], silu, concatenated, False, output, 1.702, 7.0, torch.float32)
v18 = .reshape(v17, (2, 12, 16))
return (v18)""",
        )

    def test_range_loop_over_halves_of_weights(self):
        self.assertExpectedInline(
            self.golden("views_halves_in_one_index"),
            """\
v4 = .reshape(hidden_states, -1, 16)
v5 = .reshape(v4, -1, 16)
v6 = linear(v5, gate_weight)
v7 = softmax(v6, dtype=torch.float32, dim=-1)
v8 = topk(v7, 2, dim=-1)
v9 = getitem(v8, 0)
v10 = getitem(v8, 1)
v11 = .sum(v9, dim=-1, keepdim=True)
v12 = itruediv(v9, v11)
v13 = .to(v12, torch.float32)
v14 = scatter_moe.route(v10, 4)
v15 = getitem(v14, 0)
v16 = getitem(v14, 1)
v17 = scatter_moe.mlp(v4, v13, v15, v16, [experts_gate_up_proj], [], [experts_down_proj], [], [], [], silu, concatenated, False, output, 1.702, 7.0, torch.float32)
v18 = .view_as(v17, hidden_states)
return (v18)""",
        )

    def test_range_loop_over_parts_of_weights(self):
        self.assertExpectedInline(
            self.golden("views_thirds"),
            """\
v4 = .reshape(hidden_states, -1, 16)
v5 = .reshape(v4, -1, 16)
v6 = linear(v5, gate_weight)
v7 = softmax(v6, dtype=torch.float32, dim=-1)
v8 = topk(v7, 2, dim=-1)
v9 = getitem(v8, 0)
v10 = getitem(v8, 1)
v11 = .sum(v9, dim=-1, keepdim=True)
v12 = itruediv(v9, v11)
v13 = .to(v12, torch.float32)
v14 = scatter_moe.route(v10, 4)
v15 = getitem(v14, 0)
v16 = getitem(v14, 1)
v17 = getitem(experts_gate_up_proj, (slice(0, 4, 1), slice(0, 20, 1), slice(0, 16, 1)))
v18 = getitem(experts_gate_up_proj, (slice(0, 4, 1), slice(12, 32, 1), slice(0, 16, 1)))
v19 = getitem(experts_down_proj, (slice(0, 4, 1), slice(0, 16, 1), slice(4, 24, 1)))
v20 = scatter_moe.mlp(v4, v13, v15, v16, [v17], [v18], [v19], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v21 = .view_as(v20, hidden_states)
return (v21)""",
        )

    def test_range_loop_of_temporaries(self):
        self.assertExpectedInline(
            self.golden("temporaries_residual"),
            """\
v14 = .reshape(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=1, dtype=torch.float32)
v17 = topk(v16, 2, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = .sum(v18, dim=-1, keepdim=True)
v21 = itruediv(v18, v20)
v22 = .to(v21, torch.float32)
v23 = scatter_moe.route(v19, 4)
v24 = getitem(v23, 0)
v25 = getitem(v23, 1)
v26 = scatter_moe.dispatch(v14, v24, v25, 2)
v27 = imul(v26, 0.5)
v28 = scatter_moe.parallel_linear(v27, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], v24, v25, 1, True, True, [], False)
v29 = silu(v28, inplace=False)
v30 = scatter_moe.parallel_linear(v27, [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], v24, v25, 1, True, True, [], False)
v31 = mul(v29, v30)
v32 = scatter_moe.parallel_linear(v31, [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], v24, v25, 1, True, True, [], False)
v33 = iadd(v32, v27)
v34 = scatter_moe.combine(v33, v22, v24, v25, 2, True, torch.float32)
v35 = .view_as(v34, hidden_states)
return (v35)""",
        )

    def test_range_loop_plus_equals(self):
        self.assertExpectedInline(
            self.golden("plus_equals"),
            """\
v14 = .reshape(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=1, dtype=torch.float32)
v17 = topk(v16, 2, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = .sum(v18, dim=-1, keepdim=True)
v21 = itruediv(v18, v20)
v22 = .to(v21, torch.float32)
v23 = scatter_moe.route(v19, 4)
v24 = getitem(v23, 0)
v25 = getitem(v23, 1)
v26 = scatter_moe.mlp(v14, v22, v24, v25, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v27 = .view_as(v26, hidden_states)
return (v27)""",
        )

    def test_range_loop_of_any_body(self):
        self.assertExpectedInline(
            self.golden("range_layer_norm_first"),
            """\
v26 = .reshape(hidden_states, -1, 16)
v27 = linear(v26, gate_weight, None)
v28 = softmax(v27, dim=1, dtype=torch.float32)
v29 = topk(v28, 2, dim=-1)
v30 = getitem(v29, 0)
v31 = getitem(v29, 1)
v32 = .sum(v30, dim=-1, keepdim=True)
v33 = itruediv(v30, v32)
v34 = .to(v33, torch.float32)
v35 = scatter_moe.route(v31, 4)
v36 = getitem(v35, 0)
v37 = getitem(v35, 1)
v38 = scatter_moe.dispatch(v26, v36, v37, 2)
v39 = .to(v38, torch.float32)
v40 = layer_norm(v39, (16), eps=1e-05)
v41 = .size(v36, 0)
v42 = scatter_moe.expand([experts_0_0_weight, experts_1_0_weight, experts_2_0_weight, experts_3_0_weight], v37, v41, torch.float32)
v43 = .mul(v40, v42)
v44 = .size(v36, 0)
v45 = scatter_moe.expand([experts_0_0_bias, experts_1_0_bias, experts_2_0_bias, experts_3_0_bias], v37, v44, torch.float32)
v46 = .add(v43, v45)
v47 = .to(v46, torch.float32)
v48 = scatter_moe.parallel_linear(v47, [experts_0_1_weight, experts_1_1_weight, experts_2_1_weight, experts_3_1_weight], v36, v37, 1, True, True, [experts_0_1_bias, experts_1_1_bias, experts_2_1_bias, experts_3_1_bias], False)
v49 = silu(v48, inplace=False)
v50 = scatter_moe.parallel_linear(v49, [experts_0_3_weight, experts_1_3_weight, experts_2_3_weight, experts_3_3_weight], v36, v37, 1, True, True, [experts_0_3_bias, experts_1_3_bias, experts_2_3_bias, experts_3_3_bias], False)
v51 = scatter_moe.combine(v50, v34, v36, v37, 2, True, torch.float32)
v52 = .view_as(v51, hidden_states)
return (v52)""",
        )

    def test_hit_loop(self):
        self.assertExpectedInline(
            self.golden("stacked_sentinel"),
            """\
v4 = .view(hidden_states, -1, 16)
v5 = .reshape(v4, -1, 16)
v6 = linear(v5, gate_weight)
v7 = softmax(v6, dtype=torch.float32, dim=-1)
v8 = topk(v7, 2, dim=-1)
v9 = getitem(v8, 0)
v10 = getitem(v8, 1)
v11 = .sum(v9, dim=-1, keepdim=True)
v12 = itruediv(v9, v11)
v13 = .to(v12, torch.float32)
v14 = _set_grad_enabled(False)
v15 = _set_grad_enabled(True)
v16 = scatter_moe.route(v10, 4)
v17 = getitem(v16, 0)
v18 = getitem(v16, 1)
v19 = scatter_moe.mlp(v4, v13, v17, v18, [experts_gate_up_proj], [], [experts_down_proj], [], [], [], silu, concatenated, False, output, 1.702, 7.0, torch.float32)
v20 = .reshape(v19, (2, 12, 16))
return (v20)""",
        )

    def test_hit_loop_over_modules(self):
        self.assertExpectedInline(
            self.golden("mixtral_451"),
            """\
v14 = .view(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=1, dtype=torch.float32)
v17 = topk(v16, 2, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = .sum(v18, dim=-1, keepdim=True)
v21 = itruediv(v18, v20)
v22 = .to(v21, torch.float32)
v23 = scatter_moe.route(v19, 4)
v24 = getitem(v23, 0)
v25 = getitem(v23, 1)
v26 = scatter_moe.mlp(v14, v22, v24, v25, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v27 = .reshape(v26, 2, 12, 16)
return (v27, v15)""",
        )

    def test_hit_loop_gpt_oss(self):
        self.assertExpectedInline(
            self.golden("gpt_oss_5"),
            """\
v7 = .reshape(hidden_states, -1, 16)
v8 = linear(v7, weight, bias)
v9 = topk(v8, 2, dim=-1)
v10 = getitem(v9, 0)
v11 = getitem(v9, 1)
v12 = softmax(v10, dim=1, dtype=torch.float32)
v13 = _set_grad_enabled(False)
v14 = _set_grad_enabled(True)
v15 = scatter_moe.route(v11, 4)
v16 = getitem(v15, 0)
v17 = getitem(v15, 1)
v18 = scatter_moe.mlp(v7, v12, v16, v17, [experts_gate_up_proj], [], [experts_down_proj], [experts_gate_up_proj_bias], [], [experts_down_proj_bias], clamped_swiglu, interleaved, True, output, 1.702, 1.497, torch.float32)
v19 = .reshape(v18, (2, 12, 16))
return (v19, v12)""",
        )

    def test_hit_loop_with_weight_table(self):
        self.assertExpectedInline(
            self.golden("gpt_oss_457"),
            """\
v7 = .reshape(hidden_states, -1, 16)
v8 = linear(v7, weight, bias)
v9 = topk(v8, 2, dim=-1)
v10 = getitem(v9, 0)
v11 = getitem(v9, 1)
v12 = softmax(v10, dim=1, dtype=torch.float32)
v13 = zeros(24, 4, dtype=torch.float32, device=cpu)
v14 = .scatter(v13, 1, v11, v12)
v15 = _set_grad_enabled(False)
v16 = _set_grad_enabled(True)
v17 = _set_grad_enabled(False)
v18 = _set_grad_enabled(True)
v19 = scatter_moe.route(v11, 4)
v20 = getitem(v19, 0)
v21 = getitem(v19, 1)
v22 = .clamp(v11, 0, 3)
v23 = .long(v22)
v24 = .gather(v14, 1, v23)
v25 = scatter_moe.mlp(v7, v24, v20, v21, [experts_gate_up_proj], [], [experts_down_proj], [experts_gate_up_proj_bias], [], [experts_down_proj_bias], clamped_swiglu, interleaved, True, output, 1.702, 1.497, torch.float32)
v26 = .reshape(v25, (2, 12, 16))
return (v26, v12)""",
        )

    def test_weight_on_input(self):
        self.assertExpectedInline(
            self.golden("weight_on_input"),
            """\
v14 = .reshape(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=1, dtype=torch.float32)
v17 = topk(v16, 2, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = .sum(v18, dim=-1, keepdim=True)
v21 = itruediv(v18, v20)
v22 = .to(v21, torch.float32)
v23 = scatter_moe.route(v19, 4)
v24 = getitem(v23, 0)
v25 = getitem(v23, 1)
v26 = scatter_moe.mlp(v14, v22, v24, v25, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, input, 1.702, 7.0, torch.float32)
v27 = .view_as(v26, hidden_states)
return (v27)""",
        )

    def test_sorted_slots(self):
        self.assertExpectedInline(
            self.golden("sorted_slots"),
            """\
v4 = .reshape(hidden_states, -1, 16)
v5 = linear(v4, gate_weight, None)
v6 = softmax(v5, dim=-1, dtype=torch.float32)
v7 = topk(v6, 2, dim=-1)
v8 = getitem(v7, 0)
v9 = getitem(v7, 1)
v10 = .sum(v8, dim=-1, keepdim=True)
v11 = truediv(v8, v10)
v12 = .to(v11, torch.float32)
v13 = scatter_moe.route(v9, 4)
v14 = getitem(v13, 0)
v15 = getitem(v13, 1)
v16 = scatter_moe.mlp(v4, v12, v14, v15, [experts_gate_up_proj], [], [experts_down_proj], [], [], [], silu, concatenated, False, output, 1.702, 7.0, torch.float32)
v17 = .view(v16, (2, 12, 16))
return (v17)""",
        )

    def test_sorted_slots_of_any_body(self):
        self.assertExpectedInline(
            self.golden("sorted_slots_norm"),
            """\
v5 = .reshape(hidden_states, -1, 16)
v6 = linear(v5, gate_weight, None)
v7 = softmax(v6, dim=-1, dtype=torch.float32)
v8 = topk(v7, 2, dim=-1)
v9 = getitem(v8, 0)
v10 = getitem(v8, 1)
v11 = .sum(v9, dim=-1, keepdim=True)
v12 = truediv(v9, v11)
v13 = .to(v12, torch.float32)
v14 = scatter_moe.route(v10, 4)
v15 = getitem(v14, 0)
v16 = getitem(v14, 1)
v17 = scatter_moe.parallel_linear(v5, [experts_gate_up_proj], v15, v16, 2, False, True, [], False)
v18 = .chunk(v17, 2, dim=-1)
v19 = getitem(v18, 0)
v20 = silu(v19)
v21 = getitem(v18, 1)
v22 = mul(v20, v21)
v23 = scatter_moe.parallel_linear(v22, [experts_down_proj], v15, v16, 1, True, True, [], False)
v24 = rms_norm(v23, (16), None, 1e-06)
v25 = .size(v15, 0)
v26 = scatter_moe.expand([experts_scale], v16, v25)
v27 = mul(v24, v26)
v28 = scatter_moe.combine(v27, v13, v15, v16, 2, True, torch.float32)
v29 = .view(v28, (2, 12, 16))
return (v29)""",
        )

    def test_gathered_weights(self):
        self.assertExpectedInline(
            self.golden("gathered_einsum"),
            """\
v5 = .reshape(hidden_states, -1, 16)
v6 = linear(v5, gate_weight, None)
v7 = softmax(v6, dim=-1, dtype=torch.float32)
v8 = topk(v7, 2, dim=-1)
v9 = getitem(v8, 0)
v10 = getitem(v8, 1)
v11 = .sum(v9, dim=-1, keepdim=True)
v12 = truediv(v9, v11)
v13 = scatter_moe.route(v10, 4)
v14 = getitem(v13, 0)
v15 = getitem(v13, 1)
v16 = scatter_moe.mlp(v5, v12, v14, v15, [experts_w1], [experts_w3], [experts_w2], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v17 = .view(v16, (2, 12, 16))
return (v17)""",
        )

    def test_gathered_weights_of_flat_clamped_ids(self):
        self.assertExpectedInline(
            self.golden("gathered_expert_parallel"),
            """\
v5 = .reshape(hidden_states, -1, 16)
v6 = linear(v5, gate_weight, None)
v7 = softmax(v6, dim=-1, dtype=torch.float32)
v8 = topk(v7, 2, dim=-1)
v9 = getitem(v8, 0)
v10 = getitem(v8, 1)
v11 = .sum(v9, dim=-1, keepdim=True)
v12 = truediv(v9, v11)
v13 = ge(v10, 4)
v14 = .masked_fill(v12, v13, 0.0)
v15 = .clamp(v10, max=4)
v16 = .to(v14, torch.float32)
v17 = .reshape(v16, -1)
v18 = .reshape(v15, -1)
v19 = ge(v18, 4)
v20 = .masked_fill(v17, v19, 0.0)
v21 = .reshape(v15, -1)
v22 = .clamp(v21, 0, 3)
v23 = .view(v22, -1, 2)
v24 = scatter_moe.route(v23, 4)
v25 = getitem(v24, 0)
v26 = getitem(v24, 1)
v27 = .view(v20, -1, 2)
v28 = scatter_moe.mlp(v5, v27, v25, v26, [experts_gate_up_proj], [], [experts_down_proj], [experts_gate_up_proj_bias], [], [], silu, concatenated, False, output, 1.702, 7.0, torch.float32)
v29 = .view(v28, (2, 12, 16))
return (v29)""",
        )

    def test_gathered_weights_of_any_body(self):
        self.assertExpectedInline(
            self.golden("gathered_norm"),
            """\
v5 = .reshape(hidden_states, -1, 16)
v6 = linear(v5, gate_weight, None)
v7 = softmax(v6, dim=-1, dtype=torch.float32)
v8 = topk(v7, 2, dim=-1)
v9 = getitem(v8, 0)
v10 = getitem(v8, 1)
v11 = .sum(v9, dim=-1, keepdim=True)
v12 = truediv(v9, v11)
v13 = scatter_moe.route(v10, 4)
v14 = getitem(v13, 0)
v15 = getitem(v13, 1)
v16 = scatter_moe.parallel_linear(v5, [experts_w1], v14, v15, 2, False, True, [], False)
v17 = silu(v16)
v18 = scatter_moe.parallel_linear(v5, [experts_w3], v14, v15, 2, False, True, [], False)
v19 = mul(v17, v18)
v20 = scatter_moe.parallel_linear(v19, [experts_w2], v14, v15, 1, True, True, [], False)
v21 = rms_norm(v20, (16), None, 1e-06)
v22 = scatter_moe.combine(v21, v12, v14, v15, 2, True, torch.float32)
v23 = .view(v22, (2, 12, 16))
return (v23)""",
        )

    def test_dense_experts(self):
        self.assertExpectedInline(
            self.golden("gpt_oss_457_dense"),
            """\
v7 = .reshape(hidden_states, -1, 16)
v8 = linear(v7, weight, bias)
v9 = topk(v8, 2, dim=-1)
v10 = getitem(v9, 0)
v11 = getitem(v9, 1)
v12 = softmax(v10, dim=1, dtype=torch.float32)
v13 = zeros(24, 4, dtype=torch.float32, device=cpu)
v14 = .scatter(v13, 1, v11, v12)
v15 = scatter_moe.route(v11, 4)
v16 = getitem(v15, 0)
v17 = getitem(v15, 1)
v18 = .clamp(v11, 0, 3)
v19 = .long(v18)
v20 = .gather(v14, 1, v19)
v21 = scatter_moe.mlp(v7, v20, v16, v17, [experts_gate_up_proj], [], [experts_down_proj], [experts_gate_up_proj_bias], [], [experts_down_proj_bias], clamped_swiglu, interleaved, True, output, 1.702, 1.497, torch.float32)
v22 = .reshape(v21, (2, 12, 16))
return (v22, v12)""",
        )

    def test_dense_experts_of_weighted_inputs(self):
        self.assertExpectedInline(
            self.golden("dense_llama4"),
            """\
v4 = .reshape(hidden_states, -1, 16)
v5 = linear(v4, gate_weight, None)
v6 = topk(v5, 2, dim=1)
v7 = getitem(v6, 0)
v8 = getitem(v6, 1)
v9 = full_like(v5, -inf)
v10 = .scatter_(v9, 1, v8, v7)
v11 = .float(v10)
v12 = sigmoid(v11)
v13 = scatter_moe.route(v8, 4)
v14 = getitem(v13, 0)
v15 = getitem(v13, 1)
v16 = .clamp(v8, 0, 3)
v17 = .long(v16)
v18 = .gather(v12, 1, v17)
v19 = scatter_moe.mlp(v4, v18, v14, v15, [experts_gate_up_proj], [], [experts_down_proj], [], [], [], silu, concatenated, True, input, 1.702, 7.0, torch.float32)
v20 = .view(v19, (2, 12, 16))
return (v20)""",
        )

    def test_dense_experts_added_by_number(self):
        self.assertExpectedInline(
            self.golden("dense_added_by_number"),
            """\
v4 = .reshape(hidden_states, -1, 16)
v5 = linear(v4, gate_weight, None)
v6 = topk(v5, 2, dim=1)
v7 = getitem(v6, 0)
v8 = getitem(v6, 1)
v9 = full_like(v5, -inf)
v10 = .scatter_(v9, 1, v8, v7)
v11 = .transpose(v10, 0, 1)
v12 = .float(v11)
v13 = sigmoid(v12)
v14 = silu(v4)
v15 = scatter_moe.route(v8, 4)
v16 = getitem(v15, 0)
v17 = getitem(v15, 1)
v18 = .clamp(v8, 0, 3)
v19 = .t(v13)
v20 = .long(v18)
v21 = .gather(v19, 1, v20)
v22 = scatter_moe.mlp(v4, v21, v16, v17, [experts_gate_up_proj], [], [experts_down_proj], [], [], [], silu, concatenated, True, input, 1.702, 7.0, torch.float32)
v23 = add(v14, v22)
v24 = .view(v23, (2, 12, 16))
return (v24)""",
        )

    def test_range_loop_any_mask(self):
        self.assertExpectedInline(
            self.golden("any_mask_rows"),
            """\
v14 = .reshape(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=1, dtype=torch.float32)
v17 = topk(v16, 2, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = .sum(v18, dim=-1, keepdim=True)
v21 = itruediv(v18, v20)
v22 = .to(v21, torch.float32)
v23 = eq(v19, 0)
v24 = .any(v23, dim=-1)
v25 = .any(v24)
v26 = eq(v19, 1)
v27 = .any(v26, dim=-1)
v28 = .any(v27)
v29 = eq(v19, 2)
v30 = .any(v29, dim=-1)
v31 = .any(v30)
v32 = eq(v19, 3)
v33 = .any(v32, dim=-1)
v34 = .any(v33)
v35 = scatter_moe.route(v19, 4)
v36 = getitem(v35, 0)
v37 = getitem(v35, 1)
v38 = scatter_moe.mlp(v14, v22, v36, v37, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v39 = .view_as(v38, hidden_states)
return (v39)""",
        )

    def test_range_loop_weight_table(self):
        self.assertExpectedInline(
            self.golden("dense_gate_column"),
            """\
v14 = .reshape(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=1, dtype=torch.float32)
v17 = topk(v16, 2, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = .sum(v18, dim=-1, keepdim=True)
v21 = itruediv(v18, v20)
v22 = .to(v21, torch.float32)
v23 = zeros(24, 4, dtype=torch.float32, device=cpu)
v24 = .scatter(v23, 1, v19, v22)
v25 = scatter_moe.route(v19, 4)
v26 = getitem(v25, 0)
v27 = getitem(v25, 1)
v28 = .clamp(v19, 0, 3)
v29 = .long(v28)
v30 = .gather(v24, 1, v29)
v31 = scatter_moe.mlp(v14, v30, v26, v27, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v32 = .view_as(v31, hidden_states)
return (v32)""",
        )

    def test_range_loop_of_counted_experts(self):
        self.assertExpectedInline(
            self.golden("deepseek_local"),
            """\
v18 = .view(hidden_states, -1, 16)
v19 = .type(v18, torch.float32)
v20 = .type(gate_weight, torch.float32)
v21 = linear(v19, v20)
v22 = .sigmoid(v21)
v23 = _set_grad_enabled(False)
v24 = .view(v22, -1, 8)
v25 = .unsqueeze(gate_buffers_correction_bias, 0)
v26 = add(v24, v25)
v27 = .view(v26, -1, 4, 2)
v28 = .topk(v27, 2, dim=-1)
v29 = getitem(v28, 0)
v30 = .sum(v29, dim=-1)
v31 = topk(v30, k=2, dim=-1, sorted=False)
v32 = getitem(v31, 1)
v33 = zeros_like(v30)
v34 = .scatter_(v33, 1, v32, 1)
v35 = .unsqueeze(v33, -1)
v36 = .expand(v35, -1, 4, 2)
v37 = .reshape(v36, -1, 8)
v38 = .bool(v37)
v39 = invert(v38)
v40 = .masked_fill(v26, v39, 0.0)
v41 = topk(v40, k=3, dim=-1, sorted=False)
v42 = getitem(v41, 1)
v43 = _set_grad_enabled(True)
v44 = .gather(v22, 1, v42)
v45 = .sum(v44, dim=-1, keepdim=True)
v46 = add(v45, 1e-20)
v47 = truediv(v44, v46)
v48 = mul(v47, 2.5)
v49 = .view(hidden_states, -1, 16)
v50 = sub(v42, 2)
v51 = scatter_moe.route(v50, 4)
v52 = getitem(v51, 0)
v53 = getitem(v51, 1)
v54 = scatter_moe.mlp(v49, v48, v52, v53, [experts_2_gate_proj_weight, experts_3_gate_proj_weight, experts_4_gate_proj_weight, experts_5_gate_proj_weight], [experts_2_up_proj_weight, experts_3_up_proj_weight, experts_4_up_proj_weight, experts_5_up_proj_weight], [experts_2_down_proj_weight, experts_3_down_proj_weight, experts_4_down_proj_weight, experts_5_down_proj_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v55 = .view(v54, 2, 12, 16)
v56 = linear(hidden_states, shared_experts_gate_proj_weight, None)
v57 = silu(v56, inplace=False)
v58 = linear(hidden_states, shared_experts_up_proj_weight, None)
v59 = mul(v57, v58)
v60 = linear(v59, shared_experts_down_proj_weight, None)
v61 = add(v55, v60)
return (v61)""",
        )

    def test_slot_loop(self):
        self.assertExpectedInline(
            self.golden("slots_then_experts"),
            """\
v14 = .reshape(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=1, dtype=torch.float32)
v17 = topk(v16, 2, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = .sum(v18, dim=-1, keepdim=True)
v21 = itruediv(v18, v20)
v22 = .to(v21, torch.float32)
v23 = getitem(v19, (slice(None, None, None), 0))
v24 = eq(v23, 0)
v25 = .any(v24)
v26 = getitem(v19, (slice(None, None, None), 0))
v27 = eq(v26, 1)
v28 = .any(v27)
v29 = getitem(v19, (slice(None, None, None), 0))
v30 = eq(v29, 2)
v31 = .any(v30)
v32 = getitem(v19, (slice(None, None, None), 0))
v33 = eq(v32, 3)
v34 = .any(v33)
v35 = getitem(v19, (slice(None, None, None), 1))
v36 = eq(v35, 0)
v37 = .any(v36)
v38 = getitem(v19, (slice(None, None, None), 1))
v39 = eq(v38, 1)
v40 = .any(v39)
v41 = getitem(v19, (slice(None, None, None), 1))
v42 = eq(v41, 2)
v43 = .any(v42)
v44 = getitem(v19, (slice(None, None, None), 1))
v45 = eq(v44, 3)
v46 = .any(v45)
v47 = scatter_moe.route(v19, 4)
v48 = getitem(v47, 0)
v49 = getitem(v47, 1)
v50 = scatter_moe.mlp(v14, v22, v48, v49, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v51 = .view_as(v50, hidden_states)
return (v51)""",
        )

    def test_assignment(self):
        self.assertExpectedInline(
            self.golden("switch_assignment"),
            """\
v14 = .reshape(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=1, dtype=torch.float32)
v17 = topk(v16, 1, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = .to(v18, torch.float32)
v21 = .squeeze(v19, -1)
v22 = .squeeze(v20, -1)
v23 = .view(v21, -1, 1)
v24 = scatter_moe.route(v23, 4)
v25 = getitem(v24, 0)
v26 = getitem(v24, 1)
v27 = .view(v22, -1, 1)
v28 = scatter_moe.mlp(v14, v27, v25, v26, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v29 = .view_as(v28, hidden_states)
return (v29)""",
        )

    def test_assignment_with_dropped_tokens(self):
        self.assertExpectedInline(
            self.golden("switch_dropped"),
            """\
v14 = .reshape(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=1, dtype=torch.float32)
v17 = topk(v16, 1, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = .to(v18, torch.float32)
v21 = .squeeze(v19, -1)
v22 = .squeeze(v20, -1)
v23 = one_hot(v21, 4)
v24 = .cumsum(v23, dim=0)
v25 = sub(v24, 1)
v26 = getitem(v21, (slice(None, None, None), None))
v27 = .gather(v25, 1, v26)
v28 = .squeeze(v27, 1)
v29 = lt(v28, 4)
v30 = where(v29, v21, 4)
v31 = .clone(v14)
v32 = .view(v30, -1, 1)
v33 = scatter_moe.route(v32, 4)
v34 = getitem(v33, 0)
v35 = getitem(v33, 1)
v36 = .view(v22, -1, 1)
v37 = scatter_moe.mlp(v14, v36, v34, v35, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v38 = ge(v32, 0)
v39 = lt(v32, 4)
v40 = logical_and(v38, v39)
v41 = where(v40, v37, v31)
v42 = .view_as(v41, hidden_states)
return (v42)""",
        )

    def test_flat_pairs(self):
        self.assertExpectedInline(
            self.golden("deepseek_v2_train"),
            """\
v30 = .view(hidden_states, -1, 16)
v31 = .type(v30, torch.float32)
v32 = .type(gate_weight, torch.float32)
v33 = linear(v31, v32)
v34 = .sigmoid(v33)
v35 = _set_grad_enabled(False)
v36 = .view(v34, -1, 8)
v37 = .unsqueeze(gate_buffers_correction_bias, 0)
v38 = add(v36, v37)
v39 = .view(v38, -1, 4, 2)
v40 = .topk(v39, 2, dim=-1)
v41 = getitem(v40, 0)
v42 = .sum(v41, dim=-1)
v43 = topk(v42, k=2, dim=-1, sorted=False)
v44 = getitem(v43, 1)
v45 = zeros_like(v42)
v46 = .scatter_(v45, 1, v44, 1)
v47 = .unsqueeze(v45, -1)
v48 = .expand(v47, -1, 4, 2)
v49 = .reshape(v48, -1, 8)
v50 = .bool(v49)
v51 = invert(v50)
v52 = .masked_fill(v38, v51, 0.0)
v53 = topk(v52, k=3, dim=-1, sorted=False)
v54 = getitem(v53, 1)
v55 = _set_grad_enabled(True)
v56 = .gather(v34, 1, v54)
v57 = .sum(v56, dim=-1, keepdim=True)
v58 = add(v57, 1e-20)
v59 = truediv(v56, v58)
v60 = mul(v59, 2.5)
v61 = .view(hidden_states, -1, 16)
v62 = scatter_moe.route(v54, 8)
v63 = getitem(v62, 0)
v64 = getitem(v62, 1)
v65 = scatter_moe.mlp(v61, v60, v63, v64, [experts_0_gate_proj_weight, experts_1_gate_proj_weight, experts_2_gate_proj_weight, experts_3_gate_proj_weight, experts_4_gate_proj_weight, experts_5_gate_proj_weight, experts_6_gate_proj_weight, experts_7_gate_proj_weight], [experts_0_up_proj_weight, experts_1_up_proj_weight, experts_2_up_proj_weight, experts_3_up_proj_weight, experts_4_up_proj_weight, experts_5_up_proj_weight, experts_6_up_proj_weight, experts_7_up_proj_weight], [experts_0_down_proj_weight, experts_1_down_proj_weight, experts_2_down_proj_weight, experts_3_down_proj_weight, experts_4_down_proj_weight, experts_5_down_proj_weight, experts_6_down_proj_weight, experts_7_down_proj_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v66 = .view(v65, 2, 12, 16)
v67 = linear(hidden_states, shared_experts_gate_proj_weight, None)
v68 = silu(v67, inplace=False)
v69 = linear(hidden_states, shared_experts_up_proj_weight, None)
v70 = mul(v68, v69)
v71 = linear(v70, shared_experts_down_proj_weight, None)
v72 = add(v66, v71)
return (v72)""",
        )

    def test_dense_modules(self):
        self.assertExpectedInline(
            self.golden("dense_modules_sum"),
            """\
v14 = linear(x, gate_weight, None)
v15 = softmax(v14, dim=-1)
v16 = .topk(v15, 2, dim=-1)
v17 = getitem(v16, 0)
v18 = getitem(v16, 1)
v19 = zeros_like(v14)
v20 = .sum(v17, dim=-1, keepdim=True)
v21 = truediv(v17, v20)
v22 = .scatter(v19, -1, v18, v21)
v23 = .flatten(v18, 0, 1)
v24 = scatter_moe.route(v23, 4)
v25 = getitem(v24, 0)
v26 = getitem(v24, 1)
v27 = .clamp(v23, 0, 3)
v28 = .flatten(v22, 0, 1)
v29 = .long(v27)
v30 = .gather(v28, 1, v29)
v31 = .flatten(x, 0, 1)
v32 = scatter_moe.mlp(v31, v30, v25, v26, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v33 = .unflatten(v32, 0, (2, 12))
return (v33)""",
        )

    def test_dense_modules_beside_shared(self):
        self.assertExpectedInline(
            self.golden("dense_modules_beside_shared"),
            """\
v16 = linear(x, gate_weight, None)
v17 = softmax(v16, dim=-1)
v18 = .topk(v17, 2, dim=-1)
v19 = getitem(v18, 0)
v20 = getitem(v18, 1)
v21 = zeros_like(v16)
v22 = .sum(v19, dim=-1, keepdim=True)
v23 = truediv(v19, v22)
v24 = .scatter(v21, -1, v20, v23)
v25 = .reshape(x, -1, 16)
v26 = .reshape(v24, -1, 4)
v27 = linear(v25, shared_weight, shared_bias)
v28 = .flatten(v20, 0, 1)
v29 = scatter_moe.route(v28, 4)
v30 = getitem(v29, 0)
v31 = getitem(v29, 1)
v32 = .clamp(v28, 0, 3)
v33 = .long(v32)
v34 = .gather(v26, 1, v33)
v35 = scatter_moe.mlp(v25, v34, v30, v31, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v36 = add(v27, v35)
return (v36)""",
        )

    def test_dense_modules_gathered(self):
        self.assertExpectedInline(
            self.golden("dense_modules_gather"),
            """\
v14 = linear(x, gate_weight, None)
v15 = .topk(v14, 2, dim=-1)
v16 = getitem(v15, 0)
v17 = getitem(v15, 1)
v18 = .softmax(v16, dim=-1)
v19 = .flatten(v17, 0, 1)
v20 = scatter_moe.route(v19, 4)
v21 = getitem(v20, 0)
v22 = getitem(v20, 1)
v23 = .flatten(v18, 0, 1)
v24 = .flatten(x, 0, 1)
v25 = scatter_moe.mlp(v24, v23, v21, v22, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v26 = .unflatten(v25, 0, (2, 12))
return (v26)""",
        )

    def test_dense_modules_masked(self):
        self.assertExpectedInline(
            self.golden("dense_modules_masked"),
            """\
v14 = .reshape(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=1, dtype=torch.float32)
v17 = topk(v16, 2, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = .sum(v18, dim=-1, keepdim=True)
v21 = itruediv(v18, v20)
v22 = .to(v21, torch.float32)
v23 = scatter_moe.route(v19, 4)
v24 = getitem(v23, 0)
v25 = getitem(v23, 1)
v26 = scatter_moe.mlp(v14, v22, v24, v25, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v27 = .view_as(v26, hidden_states)
return (v27)""",
        )

    def test_dense_modules_of_another_body(self):
        self.assertExpectedInline(
            self.golden("dense_modules_norm"),
            """\
v26 = linear(x, gate_weight, None)
v27 = softmax(v26, dim=-1)
v28 = .topk(v27, 2, dim=-1)
v29 = getitem(v28, 0)
v30 = getitem(v28, 1)
v31 = zeros_like(v26)
v32 = .sum(v29, dim=-1, keepdim=True)
v33 = truediv(v29, v32)
v34 = .scatter(v31, -1, v30, v33)
v35 = .flatten(v30, 0, 1)
v36 = scatter_moe.route(v35, 4)
v37 = getitem(v36, 0)
v38 = getitem(v36, 1)
v39 = .flatten(x, 0, 1)
v40 = scatter_moe.dispatch(v39, v37, v38, 2)
v41 = .to(v40, torch.float32)
v42 = layer_norm(v41, (16), eps=1e-05)
v43 = .size(v37, 0)
v44 = scatter_moe.expand([experts_0_norm_weight, experts_1_norm_weight, experts_2_norm_weight, experts_3_norm_weight], v38, v43, torch.float32)
v45 = .mul(v42, v44)
v46 = .size(v37, 0)
v47 = scatter_moe.expand([experts_0_norm_bias, experts_1_norm_bias, experts_2_norm_bias, experts_3_norm_bias], v38, v46, torch.float32)
v48 = .add(v45, v47)
v49 = .to(v48, torch.float32)
v50 = scatter_moe.parallel_linear(v49, [experts_0_up_weight, experts_1_up_weight, experts_2_up_weight, experts_3_up_weight], v37, v38, 1, True, True, [experts_0_up_bias, experts_1_up_bias, experts_2_up_bias, experts_3_up_bias], False)
v51 = getitem(v50, (Ellipsis, slice(None, 24, None)))
v52 = getitem(v50, (Ellipsis, slice(24, None, None)))
v53 = softmax(v52, dim=-1)
v54 = mul(v51, v53)
v55 = .reshape(v54, (-1, 3, 8))
v56 = .reshape(v54, (-1, 3, 8))
v57 = .mean(v56, dim=-2, keepdim=True)
v58 = mul(v55, v57)
v59 = .reshape(v58, (-1, 24))
v60 = scatter_moe.parallel_linear(v59, [experts_0_down_weight, experts_1_down_weight, experts_2_down_weight, experts_3_down_weight], v37, v38, 1, True, True, [experts_0_down_bias, experts_1_down_bias, experts_2_down_bias, experts_3_down_bias], False)
v61 = .clamp(v35, 0, 3)
v62 = .flatten(v34, 0, 1)
v63 = .long(v61)
v64 = .gather(v62, 1, v63)
v65 = scatter_moe.combine(v60, v64, v37, v38, 2, True, torch.float32)
v66 = .unflatten(v65, 0, (2, 12))
return (v66)""",
        )

    def test_tokens_dropped_from_a_one_hot_tensor(self):
        self.assertExpectedInline(
            self.golden("dropped_one_hot"),
            """\
v14 = linear(hidden_states, gate_weight, None)
v15 = .argmax(v14, dim=-1)
v16 = one_hot(v15, 4)
v17 = cumsum(v16, dim=-2)
v18 = le(v17, 4)
v19 = mul(v16, v18)
v20 = .softmax(v14, dim=-1)
v21 = max(v20, dim=-1)
v22 = getitem(v21, 0)
v23 = .view(v22, -1, 1)
v24 = .view(hidden_states, -1, 16)
v25 = .flatten(v19, 0, -2)
v26 = .any(v25, 1, True)
v27 = .argmax(v25, 1, True)
v28 = where(v26, v27, -1)
v29 = scatter_moe.route(v28, 4)
v30 = getitem(v29, 0)
v31 = getitem(v29, 1)
v32 = scatter_moe.mlp(v24, v23, v30, v31, [experts_expert_0_w1_weight, experts_expert_1_w1_weight, experts_expert_2_w1_weight, experts_expert_3_w1_weight], [experts_expert_0_w3_weight, experts_expert_1_w3_weight, experts_expert_2_w3_weight, experts_expert_3_w3_weight], [experts_expert_0_w2_weight, experts_expert_1_w2_weight, experts_expert_2_w2_weight, experts_expert_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v33 = .view(v32, (2, 12, 16))
return (v33)""",
        )

    def test_weights_viewed_inside_the_loop(self):
        self.assertExpectedInline(
            self.golden("hit_flat_weights"),
            """\
v4 = .reshape(hidden_states, -1, 16)
v5 = linear(v4, gate_weight, None)
v6 = .softmax(v5, dim=-1)
v7 = .topk(v6, 2, dim=-1)
v8 = getitem(v7, 0)
v9 = getitem(v7, 1)
v10 = scatter_moe.route(v9, 4)
v11 = getitem(v10, 0)
v12 = getitem(v10, 1)
v13 = reshape(up, (4, 24, 16))
v14 = scatter_moe.parallel_linear(v4, [v13], v11, v12, 2, False, True, [], False)
v15 = silu(v14)
v16 = reshape(down, (4, 24, 16))
v17 = scatter_moe.parallel_linear(v15, [v16], v11, v12, 1, True, True, [], True)
v18 = .reshape(v17, (-1, 16))
v19 = scatter_moe.combine(v18, v8, v11, v12, 2, True, torch.float32)
v20 = .view_as(v19, hidden_states)
return (v20)""",
        )

    def test_sorted_slots_under_autocast(self):
        self.assertExpectedInline(
            self.golden("sorted_slots_under_autocast"),
            """\
v4 = .reshape(hidden_states, -1, 16)
v5 = linear(v4, gate_weight, None)
v6 = softmax(v5, dim=-1, dtype=torch.float32)
v7 = topk(v6, 2, dim=-1)
v8 = getitem(v7, 0)
v9 = getitem(v7, 1)
v10 = .sum(v8, dim=-1, keepdim=True)
v11 = truediv(v8, v10)
v12 = .to(v11, torch.float32)
v13 = _enter_autocast(cpu, torch.bfloat16, True, None)
v14 = _enter_autocast(cpu, None, False, None)
v15 = scatter_moe.route(v9, 4)
v16 = getitem(v15, 0)
v17 = getitem(v15, 1)
v18 = scatter_moe.mlp(v4, v12, v16, v17, [experts_gate_up_proj], [], [experts_down_proj], [], [], [], silu, concatenated, False, output, 1.702, 7.0, torch.float32)
v19 = _exit_autocast(v14)
v20 = _exit_autocast(v13)
v21 = .view(v18, (2, 12, 16))
return (v21)""",
        )

    def test_range_loop_over_slots_that_are_listed_at_once(self):
        self.assertExpectedInline(
            self.golden("listed_all_at_once"),
            """\
v14 = .reshape(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=1, dtype=torch.float32)
v17 = topk(v16, 2, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = .sum(v18, dim=-1, keepdim=True)
v21 = itruediv(v18, v20)
v22 = .to(v21, torch.float32)
v23 = scatter_moe.route(v19, 4)
v24 = getitem(v23, 0)
v25 = getitem(v23, 1)
v26 = scatter_moe.mlp(v14, v22, v24, v25, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v27 = .view_as(v26, hidden_states)
return (v27)""",
        )

    def test_biases_as_rows_of_one(self):
        self.assertExpectedInline(
            self.golden("parameters_addmm"),
            """\
v6 = .reshape(hidden_states, -1, 16)
v7 = .reshape(v6, -1, 16)
v8 = linear(v7, gate_weight)
v9 = softmax(v8, dtype=torch.float32, dim=-1)
v10 = topk(v9, 2, dim=-1)
v11 = getitem(v10, 0)
v12 = getitem(v10, 1)
v13 = .sum(v11, dim=-1, keepdim=True)
v14 = itruediv(v11, v13)
v15 = .to(v14, torch.float32)
v16 = scatter_moe.route(v12, 4)
v17 = getitem(v16, 0)
v18 = getitem(v16, 1)
v19 = scatter_moe.mlp(v6, v15, v17, v18, [experts_gate_up_proj], [], [experts_down_proj], [up_bias], [], [down_bias], silu, concatenated, False, output, 1.702, 7.0, torch.float32)
v20 = .view_as(v19, hidden_states)
return (v20)""",
        )

    def test_assignment_of_listed_outputs(self):
        self.assertExpectedInline(
            self.golden("switch_lists"),
            """\
v19 = .reshape(hidden_states, -1, 16)
v20 = linear(v19, switch_weight, switch_bias)
v21 = softmax(v20, dim=-1)
v22 = max(v21, dim=-1)
v23 = getitem(v22, 0)
v24 = getitem(v22, 1)
v25 = eq(v24, 0)
v26 = eq(v24, 1)
v27 = eq(v24, 2)
v28 = eq(v24, 3)
v29 = sum(v25)
v30 = sum(v26)
v31 = sum(v27)
v32 = sum(v28)
v33 = stack([v29, v30, v31, v32])
v34 = .to(v33, cpu, torch.float32)
v35 = .view(v24, -1, 1)
v36 = scatter_moe.route(v35, 4)
v37 = getitem(v36, 0)
v38 = getitem(v36, 1)
v39 = .reshape(v37, (-1, 1))
v40 = ones_like(v39, dtype=torch.float32)
v41 = scatter_moe.mlp(v19, v40, v37, v38, [experts_0_layer1_weight, experts_1_layer1_weight, experts_2_layer1_weight, experts_3_layer1_weight], [], [experts_0_layer2_weight, experts_1_layer2_weight, experts_2_layer2_weight, experts_3_layer2_weight], [experts_0_layer1_bias, experts_1_layer1_bias, experts_2_layer1_bias, experts_3_layer1_bias], [], [experts_0_layer2_bias, experts_1_layer2_bias, experts_2_layer2_bias, experts_3_layer2_bias], relu, plain, False, output, 1.702, 7.0, torch.float32)
v42 = .view(v23, -1, 1)
v43 = mul(v41, v42)
v44 = .view(v43, (2, 12, 16))
v45 = .sum(v21, 0)
return (v44, v34, v45, v23)""",
        )

    def test_flat_pairs_in_two_dims(self):
        self.assertExpectedInline(
            self.golden("flat_paired"),
            """\
v14 = .reshape(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=1, dtype=torch.float32)
v17 = topk(v16, 2, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = .sum(v18, dim=-1, keepdim=True)
v21 = itruediv(v18, v20)
v22 = .to(v21, torch.float32)
v23 = scatter_moe.route(v19, 4)
v24 = getitem(v23, 0)
v25 = getitem(v23, 1)
v26 = scatter_moe.mlp(v14, v22, v24, v25, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v27 = .view_as(v26, hidden_states)
return (v27)""",
        )

    def test_dense_experts_cut_into_sequences(self):
        self.assertExpectedInline(
            self.golden("dense_sequences_cut"),
            """\
v5 = .reshape(hidden_states, -1, 16)
v6 = linear(v5, gate_weight, None)
v7 = softmax(v6, dim=-1)
v8 = .topk(v7, 2, dim=-1)
v9 = getitem(v8, 0)
v10 = getitem(v8, 1)
v11 = zeros_like(v6)
v12 = .scatter_(v11, -1, v10, v9)
v13 = scatter_moe.route(v10, 4)
v14 = getitem(v13, 0)
v15 = getitem(v13, 1)
v16 = .clamp(v10, 0, 3)
v17 = .long(v16)
v18 = .gather(v12, 1, v17)
v19 = scatter_moe.mlp(v5, v18, v14, v15, [gate_up_proj], [], [down_proj], [gate_up_proj_bias], [], [], silu, concatenated, True, output, 1.702, 7.0, torch.float32)
v20 = .unflatten(v19, 0, (2, 12))
return (v20)""",
        )

    def test_dense_modules_kept_by_a_mask(self):
        self.assertExpectedInline(
            self.golden("dense_modules_where"),
            """\
v14 = linear(x, gate_weight, None)
v15 = .softmax(v14, dim=-1)
v16 = .topk(v15, 2, dim=-1)
v17 = getitem(v16, 1)
v18 = .flatten(v17, 0, 1)
v19 = scatter_moe.route(v18, 4)
v20 = getitem(v19, 0)
v21 = getitem(v19, 1)
v22 = .clamp(v18, 0, 3)
v23 = .flatten(v15, 0, 1)
v24 = .long(v22)
v25 = .gather(v23, 1, v24)
v26 = .flatten(x, 0, 1)
v27 = scatter_moe.mlp(v26, v25, v20, v21, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v28 = .unflatten(v27, 0, (2, 12))
return (v28)""",
        )
