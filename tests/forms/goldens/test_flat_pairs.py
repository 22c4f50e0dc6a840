"""The graphs that the form "flat_pairs" is rewritten to, pinned."""

from tests.forms.golden import Golden


class Goldens(Golden):
    def test_flat_pairs(self):
        self.assertExpectedInline(
            self.golden("deepseek_v2_train"),
            """\
v30 = .view(hidden_states, -1, 16)
v31 = .type(v30, torch.float32)
v32 = .type(gate_weight, torch.float32)
v33 = linear(v31, v32)
v34 = .sigmoid(v33)
v35 = _set_grad_enabled(False)
v36 = .view(v34, -1, 8)
v37 = .unsqueeze(gate_buffers_correction_bias, 0)
v38 = add(v36, v37)
v39 = .view(v38, -1, 4, 2)
v40 = .topk(v39, 2, dim=-1)
v41 = getitem(v40, 0)
v42 = .sum(v41, dim=-1)
v43 = topk(v42, k=2, dim=-1, sorted=False)
v44 = getitem(v43, 1)
v45 = zeros_like(v42)
v46 = .scatter_(v45, 1, v44, 1)
v47 = .unsqueeze(v45, -1)
v48 = .expand(v47, -1, 4, 2)
v49 = .reshape(v48, -1, 8)
v50 = .bool(v49)
v51 = invert(v50)
v52 = .masked_fill(v38, v51, 0.0)
v53 = topk(v52, k=3, dim=-1, sorted=False)
v54 = getitem(v53, 1)
v55 = _set_grad_enabled(True)
v56 = .gather(v34, 1, v54)
v57 = .sum(v56, dim=-1, keepdim=True)
v58 = add(v57, 1e-20)
v59 = truediv(v56, v58)
v60 = mul(v59, 2.5)
v61 = .view(hidden_states, -1, 16)
v62 = scatter_moe.route(v54, 8)
v63 = getitem(v62, 0)
v64 = getitem(v62, 1)
v65 = scatter_moe.mlp(v61, v60, v63, v64, [experts_0_gate_proj_weight, experts_1_gate_proj_weight, experts_2_gate_proj_weight, experts_3_gate_proj_weight, experts_4_gate_proj_weight, experts_5_gate_proj_weight, experts_6_gate_proj_weight, experts_7_gate_proj_weight], [experts_0_up_proj_weight, experts_1_up_proj_weight, experts_2_up_proj_weight, experts_3_up_proj_weight, experts_4_up_proj_weight, experts_5_up_proj_weight, experts_6_up_proj_weight, experts_7_up_proj_weight], [experts_0_down_proj_weight, experts_1_down_proj_weight, experts_2_down_proj_weight, experts_3_down_proj_weight, experts_4_down_proj_weight, experts_5_down_proj_weight, experts_6_down_proj_weight, experts_7_down_proj_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v66 = .view(v65, 2, 12, 16)
v67 = linear(hidden_states, shared_experts_gate_proj_weight, None)
v68 = silu(v67, inplace=False)
v69 = linear(hidden_states, shared_experts_up_proj_weight, None)
v70 = mul(v68, v69)
v71 = linear(v70, shared_experts_down_proj_weight, None)
v72 = add(v66, v71)
return (v72)""",
        )

    def test_flat_pairs_in_two_dims(self):
        self.assertExpectedInline(
            self.golden("flat_paired"),
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

    def test_copies_expanded(self):
        self.assertExpectedInline(
            self.golden("flat_copies_expanded"),
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
v23 = .view(v19, -1)
v24 = eq(v23, 0)
v25 = .any(v24)
v26 = eq(v23, 1)
v27 = .any(v26)
v28 = eq(v23, 2)
v29 = .any(v28)
v30 = eq(v23, 3)
v31 = .any(v30)
v32 = scatter_moe.route(v19, 4)
v33 = getitem(v32, 0)
v34 = getitem(v32, 1)
v35 = scatter_moe.mlp(v14, v22, v33, v34, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v36 = .view_as(v35, hidden_states)
return (v36)""",
        )
