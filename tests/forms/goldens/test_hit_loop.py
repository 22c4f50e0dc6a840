"""The graphs that the form "hit_loop" is rewritten to, pinned."""

from tests.forms.golden import Golden


class Goldens(Golden):
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

    def test_hit_loop_of_stacks_of_one(self):
        self.assertExpectedInline(
            self.golden("stacked_of_one"),
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
v14 = zeros(24, 4, device=cpu, dtype=torch.float32)
v15 = .scatter_(v14, 1, v10, v13)
v16 = _set_grad_enabled(False)
v17 = _set_grad_enabled(True)
v18 = _set_grad_enabled(False)
v19 = _set_grad_enabled(True)
v20 = scatter_moe.route(v10, 4)
v21 = getitem(v20, 0)
v22 = getitem(v20, 1)
v23 = .clamp(v10, 0, 3)
v24 = .long(v23)
v25 = .gather(v15, 1, v24)
v26 = scatter_moe.mlp(v4, v25, v21, v22, [experts_gate_up_proj], [], [experts_down_proj], [], [], [], silu, concatenated, True, output, 1.702, 7.0, torch.float32)
v27 = .reshape(v26, (2, 12, 16))
return (v27)""",
        )

    def test_hit_experts_enumerated(self):
        self.assertExpectedInline(
            self.golden("hit_enumerated"),
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
