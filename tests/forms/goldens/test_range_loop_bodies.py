"""The graphs of the form "range_loop" with different experts, pinned."""

from tests.forms.golden import Golden


class Goldens(Golden):
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

    def test_range_loop_with_merged_weights(self):
        self.assertExpectedInline(
            self.golden("merged_stacked"),
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
v16 = getitem(up, 0)
v17 = getitem(lora_b, 0)
v18 = getitem(lora_a, 0)
v19 = matmul(v17, v18)
v20 = mul(0.5, v19)
v21 = add(v16, v20)
v22 = getitem(up, 1)
v23 = getitem(lora_b, 1)
v24 = getitem(lora_a, 1)
v25 = matmul(v23, v24)
v26 = mul(0.5, v25)
v27 = add(v22, v26)
v28 = getitem(up, 2)
v29 = getitem(lora_b, 2)
v30 = getitem(lora_a, 2)
v31 = matmul(v29, v30)
v32 = mul(0.5, v31)
v33 = add(v28, v32)
v34 = getitem(up, 3)
v35 = getitem(lora_b, 3)
v36 = getitem(lora_a, 3)
v37 = matmul(v35, v36)
v38 = mul(0.5, v37)
v39 = add(v34, v38)
v40 = scatter_moe.route(v12, 4)
v41 = getitem(v40, 0)
v42 = getitem(v40, 1)
v43 = scatter_moe.mlp(v6, v15, v41, v42, [v21, v27, v33, v39], [], [down], [], [], [], silu, plain, False, output, 1.702, 7.0, torch.float32)
v44 = .view_as(v43, hidden_states)
return (v44)""",
        )
