"""Graphs of loops that find an expert among the ids of its own tokens, pinned; the form is "range_loop"."""

from tests.forms.golden import Golden


class Goldens(Golden):
    def test_own_masked_sum(self):
        self.assertExpectedInline(
            self.golden("own_masked_sum"),
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
