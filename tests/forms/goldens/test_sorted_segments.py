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

    def test_gate_lists(self):
        self.assertExpectedInline(
            self.golden("gate_lists_softmax_first"),
            """\
v18 = .reshape(hidden_states, -1, 16)
v19 = matmul(v18, gate_clean)
v20 = softmax(v19, 1)
v21 = .topk(v20, 2, dim=1)
v22 = getitem(v21, 0)
v23 = getitem(v21, 1)
v24 = .sum(v22, 1, keepdim=True)
v25 = add(v24, 1e-06)
v26 = truediv(v22, v25)
v27 = zeros_like(v19)
v28 = .scatter(v27, 1, v23, v26)
v29 = .sum(v28, 0)
v30 = gt(v28, 0)
v31 = .sum(v30, 0)
v32 = .float(v29)
v33 = .std(v32)
v34 = .float(v29)
v35 = .mean(v34)
v36 = truediv(v33, v35)
v37 = .float(v31)
v38 = .std(v37)
v39 = .float(v31)
v40 = .mean(v39)
v41 = truediv(v38, v40)
v42 = add(v36, v41)
v43 = .expand_as(v42, v28)
v44 = .long(v23)
v45 = .gather(v28, 1, v44)
v46 = ne(v45, 0)
v47 = where(v46, v23, 4)
v48 = scatter_moe.route(v47, 4)
v49 = getitem(v48, 0)
v50 = getitem(v48, 1)
v51 = .clamp(v47, 0, 3)
v52 = .long(v51)
v53 = .gather(v28, 1, v52)
v54 = scatter_moe.mlp(v18, v53, v49, v50, [experts_0_fc1_weight, experts_1_fc1_weight, experts_2_fc1_weight, experts_3_fc1_weight], [], [experts_0_fc2_weight, experts_1_fc2_weight, experts_2_fc2_weight, experts_3_fc2_weight], [experts_0_fc1_bias, experts_1_fc1_bias, experts_2_fc1_bias, experts_3_fc1_bias], [], [experts_0_fc2_bias, experts_1_fc2_bias, experts_2_fc2_bias, experts_3_fc2_bias], relu, plain, False, output, 1.702, 7.0, torch.float32)
v55 = .view(v54, (2, 12, 16))
v56 = .to(v55, torch.float32)
return (v56, v43)""",
        )

    def test_filtered_comprehension(self):
        self.assertExpectedInline(
            self.golden("filtered_comprehension"),
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

    def test_listed_sums(self):
        self.assertExpectedInline(
            self.golden("tallies_listed_sums"),
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
v25 = .sum(v24)
v26 = eq(v23, 1)
v27 = .sum(v26)
v28 = eq(v23, 2)
v29 = .sum(v28)
v30 = eq(v23, 3)
v31 = .sum(v30)
v32 = scatter_moe.route(v19, 4)
v33 = getitem(v32, 0)
v34 = getitem(v32, 1)
v35 = scatter_moe.mlp(v14, v22, v33, v34, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v36 = .view(v35, (2, 12, 16))
return (v36)""",
        )

    def test_index_added_later(self):
        self.assertExpectedInline(
            self.golden("tallies_index_added_later"),
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
v24 = zeros(4, device=cpu)
v25 = ones(48, device=cpu)
v26 = .index_add_(v24, 0, v23, v25)
v27 = scatter_moe.route(v19, 4)
v28 = getitem(v27, 0)
v29 = getitem(v27, 1)
v30 = scatter_moe.mlp(v14, v22, v28, v29, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v31 = .view(v30, (2, 12, 16))
return (v31)""",
        )
