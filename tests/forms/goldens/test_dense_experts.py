"""The graphs that the form "dense_experts" is rewritten to, pinned."""

from tests.forms.golden import Golden


class Goldens(Golden):
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
