"""The graphs that the form "slot_loop" is rewritten to, pinned."""

from tests.forms.golden import Golden


class Goldens(Golden):
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
