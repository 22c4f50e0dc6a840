"""The graphs that the form "sorted_segments" is rewritten to, pinned."""

from tests.forms.golden import Golden


class Goldens(Golden):
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
