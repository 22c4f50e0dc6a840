"""The graphs that the form "dense_modules" is rewritten to, pinned."""

from tests.forms.golden import Golden


class Goldens(Golden):
    def test_dense_modules(self):
        self.assertExpectedInline(
            self.golden("dense_modules_sum"),
            """\
v14 = linear(x, gate_weight, None)
v15 = softmax(v14, dim=-1)
v16 = .topk(v15, 2, dim=-1)
v17 = getitem(v16, 0)
v18 = getitem(v16, 1)
v19 = zeros_like(v14)
v20 = .sum(v17, dim=-1, keepdim=True)
v21 = truediv(v17, v20)
v22 = .scatter(v19, -1, v18, v21)
v23 = .flatten(v18, 0, 1)
v24 = scatter_moe.route(v23, 4)
v25 = getitem(v24, 0)
v26 = getitem(v24, 1)
v27 = .clamp(v23, 0, 3)
v28 = .flatten(v22, 0, 1)
v29 = .long(v27)
v30 = .gather(v28, 1, v29)
v31 = .flatten(x, 0, 1)
v32 = scatter_moe.mlp(v31, v30, v25, v26, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v33 = .unflatten(v32, 0, (2, 12))
return (v33)""",
        )

    def test_dense_modules_beside_shared(self):
        self.assertExpectedInline(
            self.golden("dense_modules_beside_shared"),
            """\
v16 = linear(x, gate_weight, None)
v17 = softmax(v16, dim=-1)
v18 = .topk(v17, 2, dim=-1)
v19 = getitem(v18, 0)
v20 = getitem(v18, 1)
v21 = zeros_like(v16)
v22 = .sum(v19, dim=-1, keepdim=True)
v23 = truediv(v19, v22)
v24 = .scatter(v21, -1, v20, v23)
v25 = .reshape(x, -1, 16)
v26 = .reshape(v24, -1, 4)
v27 = linear(v25, shared_weight, shared_bias)
v28 = .flatten(v20, 0, 1)
v29 = scatter_moe.route(v28, 4)
v30 = getitem(v29, 0)
v31 = getitem(v29, 1)
v32 = .clamp(v28, 0, 3)
v33 = .long(v32)
v34 = .gather(v26, 1, v33)
v35 = scatter_moe.mlp(v25, v34, v30, v31, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v36 = add(v27, v35)
return (v36)""",
        )

    def test_dense_modules_gathered(self):
        self.assertExpectedInline(
            self.golden("dense_modules_gather"),
            """\
v14 = linear(x, gate_weight, None)
v15 = .topk(v14, 2, dim=-1)
v16 = getitem(v15, 0)
v17 = getitem(v15, 1)
v18 = .softmax(v16, dim=-1)
v19 = .flatten(v17, 0, 1)
v20 = scatter_moe.route(v19, 4)
v21 = getitem(v20, 0)
v22 = getitem(v20, 1)
v23 = .flatten(v18, 0, 1)
v24 = .flatten(x, 0, 1)
v25 = scatter_moe.mlp(v24, v23, v21, v22, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v26 = .unflatten(v25, 0, (2, 12))
return (v26)""",
        )

    def test_dense_modules_masked(self):
        self.assertExpectedInline(
            self.golden("dense_modules_masked"),
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

    def test_dense_modules_of_another_body(self):
        self.assertExpectedInline(
            self.golden("dense_modules_norm"),
            """\
v26 = linear(x, gate_weight, None)
v27 = softmax(v26, dim=-1)
v28 = .topk(v27, 2, dim=-1)
v29 = getitem(v28, 0)
v30 = getitem(v28, 1)
v31 = zeros_like(v26)
v32 = .sum(v29, dim=-1, keepdim=True)
v33 = truediv(v29, v32)
v34 = .scatter(v31, -1, v30, v33)
v35 = .flatten(v30, 0, 1)
v36 = scatter_moe.route(v35, 4)
v37 = getitem(v36, 0)
v38 = getitem(v36, 1)
v39 = .flatten(x, 0, 1)
v40 = scatter_moe.dispatch(v39, v37, v38, 2)
v41 = .to(v40, torch.float32)
v42 = layer_norm(v41, (16), eps=1e-05)
v43 = .size(v37, 0)
v44 = scatter_moe.expand([experts_0_norm_weight, experts_1_norm_weight, experts_2_norm_weight, experts_3_norm_weight], v38, v43, torch.float32)
v45 = .mul(v42, v44)
v46 = .size(v37, 0)
v47 = scatter_moe.expand([experts_0_norm_bias, experts_1_norm_bias, experts_2_norm_bias, experts_3_norm_bias], v38, v46, torch.float32)
v48 = .add(v45, v47)
v49 = .to(v48, torch.float32)
v50 = scatter_moe.parallel_linear(v49, [experts_0_up_weight, experts_1_up_weight, experts_2_up_weight, experts_3_up_weight], v37, v38, 1, True, True, [experts_0_up_bias, experts_1_up_bias, experts_2_up_bias, experts_3_up_bias], False)
v51 = getitem(v50, (Ellipsis, slice(None, 24, None)))
v52 = getitem(v50, (Ellipsis, slice(24, None, None)))
v53 = softmax(v52, dim=-1)
v54 = mul(v51, v53)
v55 = .reshape(v54, (-1, 3, 8))
v56 = .reshape(v54, (-1, 3, 8))
v57 = .mean(v56, dim=-2, keepdim=True)
v58 = mul(v55, v57)
v59 = .reshape(v58, (-1, 24))
v60 = scatter_moe.parallel_linear(v59, [experts_0_down_weight, experts_1_down_weight, experts_2_down_weight, experts_3_down_weight], v37, v38, 1, True, True, [experts_0_down_bias, experts_1_down_bias, experts_2_down_bias, experts_3_down_bias], False)
v61 = .clamp(v35, 0, 3)
v62 = .flatten(v34, 0, 1)
v63 = .long(v61)
v64 = .gather(v62, 1, v63)
v65 = scatter_moe.combine(v60, v64, v37, v38, 2, True, torch.float32)
v66 = .unflatten(v65, 0, (2, 12))
return (v66)""",
        )

    def test_dense_modules_kept_by_a_mask(self):
        self.assertExpectedInline(
            self.golden("dense_modules_where"),
            """\
v14 = linear(x, gate_weight, None)
v15 = .softmax(v14, dim=-1)
v16 = .topk(v15, 2, dim=-1)
v17 = getitem(v16, 1)
v18 = .flatten(v17, 0, 1)
v19 = scatter_moe.route(v18, 4)
v20 = getitem(v19, 0)
v21 = getitem(v19, 1)
v22 = .clamp(v18, 0, 3)
v23 = .flatten(v15, 0, 1)
v24 = .long(v22)
v25 = .gather(v23, 1, v24)
v26 = .flatten(x, 0, 1)
v27 = scatter_moe.mlp(v26, v25, v20, v21, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v28 = .unflatten(v27, 0, (2, 12))
return (v28)""",
        )

    def test_dense_modules_by_slot(self):
        self.assertExpectedInline(
            self.golden("dense_slots"),
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

    def test_masked_inputs(self):
        self.assertExpectedInline(
            self.golden("dense_slots_masked_inputs"),
            """\
v14 = linear(hidden_states, gate_weight, None)
v15 = softmax(v14, dim=-1)
v16 = topk(v15, 2, dim=-1)
v17 = getitem(v16, 0)
v18 = getitem(v16, 1)
v19 = getitem(v18, (slice(None, None, None), slice(None, None, None), 0))
v20 = eq(v19, 0)
v21 = .unsqueeze(v20, -1)
v22 = .any(v21)
v23 = eq(v19, 1)
v24 = .unsqueeze(v23, -1)
v25 = .any(v24)
v26 = eq(v19, 2)
v27 = .unsqueeze(v26, -1)
v28 = .any(v27)
v29 = eq(v19, 3)
v30 = .unsqueeze(v29, -1)
v31 = .any(v30)
v32 = getitem(v18, (slice(None, None, None), slice(None, None, None), 1))
v33 = eq(v32, 0)
v34 = .unsqueeze(v33, -1)
v35 = .any(v34)
v36 = eq(v32, 1)
v37 = .unsqueeze(v36, -1)
v38 = .any(v37)
v39 = eq(v32, 2)
v40 = .unsqueeze(v39, -1)
v41 = .any(v40)
v42 = eq(v32, 3)
v43 = .unsqueeze(v42, -1)
v44 = .any(v43)
v45 = .flatten(v18, 0, 1)
v46 = scatter_moe.route(v45, 4)
v47 = getitem(v46, 0)
v48 = getitem(v46, 1)
v49 = .flatten(v17, 0, 1)
v50 = .flatten(hidden_states, 0, 1)
v51 = scatter_moe.mlp(v50, v49, v47, v48, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v52 = .unflatten(v51, 0, (2, 12))
return (v52)""",
        )
