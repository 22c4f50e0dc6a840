"""The graphs that the form "assignment" is rewritten to, pinned."""

from tests.forms.golden import Golden


class Goldens(Golden):
    def test_assignment(self):
        self.assertExpectedInline(
            self.golden("switch_assignment"),
            """\
v14 = .reshape(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=1, dtype=torch.float32)
v17 = topk(v16, 1, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = .to(v18, torch.float32)
v21 = .squeeze(v19, -1)
v22 = .squeeze(v20, -1)
v23 = .view(v21, -1, 1)
v24 = scatter_moe.route(v23, 4)
v25 = getitem(v24, 0)
v26 = getitem(v24, 1)
v27 = .view(v22, -1, 1)
v28 = scatter_moe.mlp(v14, v27, v25, v26, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v29 = .view_as(v28, hidden_states)
return (v29)""",
        )

    def test_assignment_with_dropped_tokens(self):
        self.assertExpectedInline(
            self.golden("switch_dropped"),
            """\
v14 = .reshape(hidden_states, -1, 16)
v15 = linear(v14, gate_weight, None)
v16 = softmax(v15, dim=1, dtype=torch.float32)
v17 = topk(v16, 1, dim=-1)
v18 = getitem(v17, 0)
v19 = getitem(v17, 1)
v20 = .to(v18, torch.float32)
v21 = .squeeze(v19, -1)
v22 = .squeeze(v20, -1)
v23 = one_hot(v21, 4)
v24 = .cumsum(v23, dim=0)
v25 = sub(v24, 1)
v26 = getitem(v21, (slice(None, None, None), None))
v27 = .gather(v25, 1, v26)
v28 = .squeeze(v27, 1)
v29 = lt(v28, 4)
v30 = where(v29, v21, 4)
v31 = .clone(v14)
v32 = .view(v30, -1, 1)
v33 = scatter_moe.route(v32, 4)
v34 = getitem(v33, 0)
v35 = getitem(v33, 1)
v36 = .view(v22, -1, 1)
v37 = scatter_moe.mlp(v14, v36, v34, v35, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v38 = ge(v32, 0)
v39 = lt(v32, 4)
v40 = logical_and(v38, v39)
v41 = where(v40, v37, v31)
v42 = .view_as(v41, hidden_states)
return (v42)""",
        )

    def test_assignment_of_listed_outputs(self):
        self.assertExpectedInline(
            self.golden("switch_lists"),
            """\
v19 = .reshape(hidden_states, -1, 16)
v20 = linear(v19, switch_weight, switch_bias)
v21 = softmax(v20, dim=-1)
v22 = max(v21, dim=-1)
v23 = getitem(v22, 0)
v24 = getitem(v22, 1)
v25 = eq(v24, 0)
v26 = eq(v24, 1)
v27 = eq(v24, 2)
v28 = eq(v24, 3)
v29 = sum(v25)
v30 = sum(v26)
v31 = sum(v27)
v32 = sum(v28)
v33 = stack([v29, v30, v31, v32])
v34 = .to(v33, cpu, torch.float32)
v35 = .view(v24, -1, 1)
v36 = scatter_moe.route(v35, 4)
v37 = getitem(v36, 0)
v38 = getitem(v36, 1)
v39 = .reshape(v37, (-1, 1))
v40 = ones_like(v39, dtype=torch.float32)
v41 = scatter_moe.mlp(v19, v40, v37, v38, [experts_0_layer1_weight, experts_1_layer1_weight, experts_2_layer1_weight, experts_3_layer1_weight], [], [experts_0_layer2_weight, experts_1_layer2_weight, experts_2_layer2_weight, experts_3_layer2_weight], [experts_0_layer1_bias, experts_1_layer1_bias, experts_2_layer1_bias, experts_3_layer1_bias], [], [experts_0_layer2_bias, experts_1_layer2_bias, experts_2_layer2_bias, experts_3_layer2_bias], relu, plain, False, output, 1.702, 7.0, torch.float32)
v42 = .view(v23, -1, 1)
v43 = mul(v41, v42)
v44 = .view(v43, (2, 12, 16))
v45 = .expand(v34, 24, -1)
v46 = getitem(v23, (slice(None, None, None), None))
v47 = .expand_as(v46, v21)
return (v44, v45, v21, v47)""",
        )

    def test_assignment_by_listed_experts(self):
        self.assertExpectedInline(
            self.golden("dropped_listed"),
            """\
v14 = linear(hidden_states, gate_weight, None)
v15 = .softmax(v14, dim=-1)
v16 = max(v15, dim=-1)
v17 = getitem(v16, 0)
v18 = .unsqueeze(v17, -1)
v19 = .argmax(v14, dim=-1)
v20 = one_hot(v19, 4)
v21 = cumsum(v20, dim=-2)
v22 = le(v21, 4)
v23 = mul(v20, v22)
v24 = .flatten(v23, 0, -2)
v25 = .any(v24, 1, True)
v26 = .argmax(v24, 1, True)
v27 = where(v25, v26, -1)
v28 = scatter_moe.route(v27, 4)
v29 = getitem(v28, 0)
v30 = getitem(v28, 1)
v31 = .reshape(v29, (-1, 1))
v32 = ones_like(v31, dtype=torch.float32)
v33 = .flatten(hidden_states, 0, 1)
v34 = scatter_moe.mlp(v33, v32, v29, v30, [experts_expert_0_w1_weight, experts_expert_1_w1_weight, experts_expert_2_w1_weight, experts_expert_3_w1_weight], [experts_expert_0_w3_weight, experts_expert_1_w3_weight, experts_expert_2_w3_weight, experts_expert_3_w3_weight], [experts_expert_0_w2_weight, experts_expert_1_w2_weight, experts_expert_2_w2_weight, experts_expert_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v35 = .unflatten(v34, 0, (2, 12))
v36 = mul(v35, v18)
return (v36)""",
        )

    def test_choices(self):
        self.assertExpectedInline(
            self.golden("choices_assigned"),
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
v23 = zeros_like(v14)
v24 = getitem(v19, (slice(None, None, None), 0))
v25 = .view(v24, -1, 1)
v26 = scatter_moe.route(v25, 4)
v27 = getitem(v26, 0)
v28 = getitem(v26, 1)
v29 = .reshape(v27, (-1, 1))
v30 = ones_like(v29, dtype=torch.float32)
v31 = scatter_moe.mlp(v14, v30, v27, v28, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v32 = getitem(v22, (slice(None, None, None), 0, None))
v33 = mul(v31, v32)
v34 = add(v23, v33)
v35 = getitem(v19, (slice(None, None, None), 1))
v36 = .view(v35, -1, 1)
v37 = scatter_moe.route(v36, 4)
v38 = getitem(v37, 0)
v39 = getitem(v37, 1)
v40 = .reshape(v38, (-1, 1))
v41 = ones_like(v40, dtype=torch.float32)
v42 = scatter_moe.mlp(v14, v41, v38, v39, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v43 = getitem(v22, (slice(None, None, None), 1, None))
v44 = mul(v42, v43)
v45 = add(v34, v44)
v46 = .view_as(v45, hidden_states)
return (v46)""",
        )

    def test_assignment_of_sequences(self):
        self.assertExpectedInline(
            self.golden("sequence_top_1_assigned"),
            """\
v14 = linear(x, gate_weight, None)
v15 = softmax(v14, dim=-1)
v16 = .max(v15, dim=-1)
v17 = getitem(v16, 0)
v18 = getitem(v16, 1)
v19 = eq(v18, 0)
v20 = .any(v19)
v21 = eq(v18, 1)
v22 = .any(v21)
v23 = eq(v18, 2)
v24 = .any(v23)
v25 = eq(v18, 3)
v26 = .any(v25)
v27 = .reshape(v18, (-1, 1))
v28 = scatter_moe.route(v27, 4)
v29 = getitem(v28, 0)
v30 = getitem(v28, 1)
v31 = .reshape(v17, (-1, 1))
v32 = .flatten(x, 0, 1)
v33 = scatter_moe.mlp(v32, v31, v29, v30, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v34 = .unflatten(v33, 0, (2, 12))
return (v34)""",
        )

    def test_choices_weighted_inside(self):
        self.assertExpectedInline(
            self.golden("choices_weighted_inside"),
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
v24 = .view(v23, -1, 1)
v25 = scatter_moe.route(v24, 4)
v26 = getitem(v25, 0)
v27 = getitem(v25, 1)
v28 = .select(v22, -1, 0)
v29 = .reshape(v28, (-1, 1))
v30 = scatter_moe.mlp(v14, v29, v26, v27, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v31 = getitem(v19, (slice(None, None, None), 1))
v32 = .view(v31, -1, 1)
v33 = scatter_moe.route(v32, 4)
v34 = getitem(v33, 0)
v35 = getitem(v33, 1)
v36 = .select(v22, -1, 1)
v37 = .reshape(v36, (-1, 1))
v38 = scatter_moe.mlp(v14, v37, v34, v35, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v39 = stack([v30, v38])
v40 = .sum(v39, dim=0)
v41 = .view_as(v40, hidden_states)
return (v41)""",
        )
