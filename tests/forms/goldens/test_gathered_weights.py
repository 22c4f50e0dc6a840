"""The graphs that the form "gathered_weights" is rewritten to, pinned."""

from tests.forms.golden import Golden


class Goldens(Golden):
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
