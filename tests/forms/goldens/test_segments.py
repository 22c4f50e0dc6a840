"""The graphs that the form "segments" is rewritten to, pinned."""

from tests.forms.golden import Golden


class Goldens(Golden):
    def test_segments(self):
        self.assertExpectedInline(
            self.golden("segments_residual"),
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
v24 = .argsort(v23)
v25 = floordiv(v24, 2)
v26 = getitem(v14, v25)
v27 = scatter_moe.route(v19, 4)
v28 = getitem(v27, 0)
v29 = getitem(v27, 1)
v30 = .size(v28, 0)
v31 = arange(v30, dtype=torch.int32, device=cpu)
v32 = .reshape(v31, (-1, 1))
v33 = ones_like(v32, dtype=torch.float32)
v34 = scatter_moe.mlp(v26, v33, v31, v29, [experts_0_w1_weight, experts_1_w1_weight, experts_2_w1_weight, experts_3_w1_weight], [experts_0_w3_weight, experts_1_w3_weight, experts_2_w3_weight, experts_3_w3_weight], [experts_0_w2_weight, experts_1_w2_weight, experts_2_w2_weight, experts_3_w2_weight], [], [], [], silu, separate, False, output, 1.702, 7.0, torch.float32)
v35 = .view(v22, -1)
v36 = getitem(v35, v24)
v37 = .unsqueeze(v36, -1)
v38 = mul(v34, v37)
v39 = floordiv(v24, 2)
v40 = .index_add(v14, 0, v39, v38)
v41 = .view(v40, (2, 12, 16))
return (v41)""",
        )

    def test_segments_of_linear_layers(self):
        self.assertExpectedInline(
            self.golden("segments_projections"),
            """\
v4 = .reshape(hidden_states, -1, 16)
v5 = linear(v4, router_layer_weight, None)
v6 = .float(v5)
v7 = .topk(v6, 2, dim=1)
v8 = getitem(v7, 0)
v9 = getitem(v7, 1)
v10 = softmax(v8, dim=1)
v11 = .type_as(v10, v4)
v12 = .flatten(v9)
v13 = .sort(v12, 0)
v14 = getitem(v13, 1)
v15 = .div(v14, 2, rounding_mode=trunc)
v16 = .flatten(v11)
v17 = getitem(v16, v14)
v18 = scatter_moe.route(v9, 4)
v19 = getitem(v18, 1)
v20 = .int(v14)
v21 = scatter_moe.parallel_linear(v4, [input_linear_weight], v20, v19, 2, False, False, [], False)
v22 = .view(v21, -1, 2, 24)
v23 = normalize(v22, dim=-1)
v24 = .mean(v22, 1, keepdim=True)
v25 = add(v23, v24)
v26 = .reshape(v25, -1, 24)
v27 = scatter_moe.route(v9, 4)
v28 = getitem(v27, 1)
v29 = .int(v14)
v30 = scatter_moe.parallel_linear(v26, [output_linear_weight], v29, v28, 1, False, True, [], False)
v31 = getitem(v17, (slice(None, None, None), None))
v32 = mul(v30, v31)
v33 = zeros((24, 16), dtype=torch.float32, device=cpu)
v34 = .index_add(v33, 0, v15, v32)
v35 = .view(v34, (2, 12, 16))
return (v35)""",
        )
