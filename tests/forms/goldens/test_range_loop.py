"""The graphs that the form "range_loop" is rewritten to, pinned."""

from tests.forms.golden import Golden


class Goldens(Golden):
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

    def test_tokens_dropped_from_a_one_hot_tensor_with_a_dim_of_choices(self):
        self.assertExpectedInline(
            self.golden("dropped_choice"),
            """\
v14 = .view(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = .softmax(v15, dim=-1)
v17 = .max(v16, dim=-1, keepdim=True)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = one_hot(v19, 4)
v21 = cumsum(v20, dim=0)
v22 = le(v21, 4)
v23 = mul(v20, v22)
v24 = .flatten(v23, 0, -2)
v25 = .any(v24, 1, True)
v26 = .argmax(v24, 1, True)
v27 = where(v25, v26, -1)
v28 = scatter_moe.route(v27, 4)
v29 = getitem(v28, 0)
v30 = getitem(v28, 1)
v31 = scatter_moe.mlp(v14, v18, v29, v30, [experts_expert_0_w1_weight, experts_expert_1_w1_weight, experts_expert_2_w1_weight, experts_expert_3_w1_weight], [experts_expert_0_w3_weight, experts_expert_1_w3_weight, experts_expert_2_w3_weight, experts_expert_3_w3_weight], [experts_expert_0_w2_weight, experts_expert_1_w2_weight, experts_expert_2_w2_weight, experts_expert_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v32 = .view(v31, (2, 12, 16))
return (v32)""",
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

    def test_range_loop_over_gate_columns(self):
        self.assertExpectedInline(
            self.golden("gate_columns_positions"),
            """\
v14 = .reshape(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=-1)
v17 = .topk(v16, 2, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = zeros_like(v15)
v21 = .sum(v18, -1, keepdim=True)
v22 = truediv(v18, v21)
v23 = .scatter(v20, -1, v19, v22)
v24 = .long(v19)
v25 = .gather(v23, 1, v24)
v26 = gt(v25, 0)
v27 = where(v26, v19, 4)
v28 = scatter_moe.route(v27, 4)
v29 = getitem(v28, 0)
v30 = getitem(v28, 1)
v31 = .clamp(v27, 0, 3)
v32 = .long(v31)
v33 = .gather(v23, 1, v32)
v34 = scatter_moe.mlp(v14, v33, v29, v30, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v35 = .view_as(v34, hidden_states)
return (v35)""",
        )
