"""The graphs that the form "sorted_slots" is rewritten to, pinned."""

from tests.forms.golden import Golden


class Goldens(Golden):
    def test_sorted_slots(self):
        self.assertExpectedInline(
            self.golden("sorted_slots"),
            """\
v4 = .reshape(hidden_states, -1, 16)
v5 = linear(v4, gate_weight, None)
v6 = softmax(v5, dim=-1, dtype=torch.float32)
v7 = topk(v6, 2, dim=-1)
v8 = getitem(v7, 0)
v9 = getitem(v7, 1)
v10 = .sum(v8, dim=-1, keepdim=True)
v11 = truediv(v8, v10)
v12 = .to(v11, torch.float32)
v13 = scatter_moe.route(v9, 4)
v14 = getitem(v13, 0)
v15 = getitem(v13, 1)
v16 = scatter_moe.mlp(v4, v12, v14, v15, [experts_gate_up_proj], [], [experts_down_proj], [], [], [], silu, concatenated, False, output, 1.702, 7.0, torch.float32)
v17 = .view(v16, (2, 12, 16))
return (v17)""",
        )

    def test_sorted_slots_of_any_body(self):
        self.assertExpectedInline(
            self.golden("sorted_slots_norm"),
            """\
v5 = .reshape(hidden_states, -1, 16)
v6 = linear(v5, gate_weight, None)
v7 = softmax(v6, dim=-1, dtype=torch.float32)
v8 = topk(v7, 2, dim=-1)
v9 = getitem(v8, 0)
v10 = getitem(v8, 1)
v11 = .sum(v9, dim=-1, keepdim=True)
v12 = truediv(v9, v11)
v13 = .to(v12, torch.float32)
v14 = scatter_moe.route(v10, 4)
v15 = getitem(v14, 0)
v16 = getitem(v14, 1)
v17 = scatter_moe.parallel_linear(v5, [experts_gate_up_proj], v15, v16, 2, False, True, [], False)
v18 = .chunk(v17, 2, dim=-1)
v19 = getitem(v18, 0)
v20 = silu(v19)
v21 = getitem(v18, 1)
v22 = mul(v20, v21)
v23 = scatter_moe.parallel_linear(v22, [experts_down_proj], v15, v16, 1, True, True, [], False)
v24 = rms_norm(v23, (16), None, 1e-06)
v25 = .size(v15, 0)
v26 = scatter_moe.expand([experts_scale], v16, v25)
v27 = mul(v24, v26)
v28 = scatter_moe.combine(v27, v13, v15, v16, 2, True, torch.float32)
v29 = .view(v28, (2, 12, 16))
return (v29)""",
        )

    def test_sorted_slots_under_autocast(self):
        self.assertExpectedInline(
            self.golden("sorted_slots_under_autocast"),
            """\
v4 = .reshape(hidden_states, -1, 16)
v5 = linear(v4, gate_weight, None)
v6 = softmax(v5, dim=-1, dtype=torch.float32)
v7 = topk(v6, 2, dim=-1)
v8 = getitem(v7, 0)
v9 = getitem(v7, 1)
v10 = .sum(v8, dim=-1, keepdim=True)
v11 = truediv(v8, v10)
v12 = .to(v11, torch.float32)
v13 = _enter_autocast(cpu, torch.bfloat16, True, None)
v14 = _enter_autocast(cpu, None, False, None)
v15 = scatter_moe.route(v9, 4)
v16 = getitem(v15, 0)
v17 = getitem(v15, 1)
v18 = scatter_moe.mlp(v4, v12, v16, v17, [experts_gate_up_proj], [], [experts_down_proj], [], [], [], silu, concatenated, False, output, 1.702, 7.0, torch.float32)
v19 = _exit_autocast(v14)
v20 = _exit_autocast(v13)
v21 = .view(v18, (2, 12, 16))
return (v21)""",
        )
