"""Graphs that loops over lists of numbers are rewritten to, pinned; the form is "range_loop"."""

from tests.forms.golden import Golden


class Goldens(Golden):
    def test_set_of_ids(self):
        self.assertExpectedInline(
            self.golden("hit_list_set"),
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

    def test_counted_of_hit(self):
        self.assertExpectedInline(
            self.golden("loads_counted_of_hit"),
            """\
v15 = .reshape(hidden_states, -1, 16)
v16 = linear(v15, gate_weight, None)
v17 = softmax(v16, dim=1, dtype=torch.float32)
v18 = topk(v17, 2, dim=-1)
v19 = getitem(v18, 0)
v20 = getitem(v18, 1)
v21 = .sum(v19, dim=-1, keepdim=True)
v22 = itruediv(v19, v21)
v23 = .to(v22, torch.float32)
v24 = getitem(buffers_usage, 0)
v25 = eq(v20, 0)
v26 = sum(v25)
v27 = .to(v26, cpu, torch.int64)
v28 = iadd(v24, v27)
v29 = setitem(buffers_usage, 0, v28)
v30 = getitem(buffers_usage, 1)
v31 = eq(v20, 1)
v32 = sum(v31)
v33 = .to(v32, cpu, torch.int64)
v34 = iadd(v30, v33)
v35 = setitem(buffers_usage, 1, v34)
v36 = getitem(buffers_usage, 2)
v37 = eq(v20, 2)
v38 = sum(v37)
v39 = .to(v38, cpu, torch.int64)
v40 = iadd(v36, v39)
v41 = setitem(buffers_usage, 2, v40)
v42 = getitem(buffers_usage, 3)
v43 = eq(v20, 3)
v44 = sum(v43)
v45 = .to(v44, cpu, torch.int64)
v46 = iadd(v42, v45)
v47 = setitem(buffers_usage, 3, v46)
v48 = scatter_moe.route(v20, 4)
v49 = getitem(v48, 0)
v50 = getitem(v48, 1)
v51 = scatter_moe.mlp(v15, v23, v49, v50, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v52 = .view_as(v51, hidden_states)
return (v52)""",
        )

    def test_merged_of_hit(self):
        self.assertExpectedInline(
            self.golden("merged_of_hit"),
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

    def test_slot_numbers_in_order(self):
        self.assertExpectedInline(
            self.golden("slot_numbers_in_order"),
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
