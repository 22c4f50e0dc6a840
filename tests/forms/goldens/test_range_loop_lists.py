"""Graphs that loops over lists of numbers are rewritten to, pinned; the form is "range_loop"."""

from tests.forms.golden import Golden


class Goldens(Golden):
    def test_set_of_ids(self):
        self.assertExpectedInline(
            self.golden("hit_list_set"),
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
