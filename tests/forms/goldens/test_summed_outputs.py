"""The graphs that the form "summed_outputs" is rewritten to, pinned."""

from tests.forms.golden import Golden


class Goldens(Golden):
    def test_summed_stack(self):
        self.assertExpectedInline(
            self.golden("summed_stacked"),
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

    def test_added_to_another_output(self):
        self.assertExpectedInline(
            self.golden("summed_in_loop"),
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
v23 = tanh(v14)
v24 = eq(v19, 0)
v25 = .any(v24, -1)
v26 = .any(v25)
v27 = eq(v19, 1)
v28 = .any(v27, -1)
v29 = .any(v28)
v30 = eq(v19, 2)
v31 = .any(v30, -1)
v32 = .any(v31)
v33 = eq(v19, 3)
v34 = .any(v33, -1)
v35 = .any(v34)
v36 = scatter_moe.route(v19, 4)
v37 = getitem(v36, 0)
v38 = getitem(v36, 1)
v39 = scatter_moe.mlp(v14, v22, v37, v38, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v40 = add(v23, v39)
v41 = .view_as(v40, hidden_states)
return (v41)""",
        )

    def test_summed_places_of_choices(self):
        self.assertExpectedInline(
            self.golden("summed_buffer_of_choices"),
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
