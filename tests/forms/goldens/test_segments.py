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
v18 = getitem(v4, v15)
v19 = scatter_moe.route(v9, 4)
v20 = getitem(v19, 0)
v21 = getitem(v19, 1)
v22 = .size(v20, 0)
v23 = arange(v22, dtype=torch.int32, device=cpu)
v24 = scatter_moe.parallel_linear(v18, [input_linear_weight], v23, v21, 1, True, True, [], False)
v25 = zeros((48, 24), dtype=torch.float32, device=cpu)
v26 = .index_add(v25, 0, v14, v24)
v27 = .view(v26, -1, 2, 24)
v28 = normalize(v27, dim=-1)
v29 = .mean(v27, 1, keepdim=True)
v30 = add(v28, v29)
v31 = .reshape(v30, -1, 24)
v32 = getitem(v31, v14)
v33 = scatter_moe.route(v9, 4)
v34 = getitem(v33, 0)
v35 = getitem(v33, 1)
v36 = .size(v34, 0)
v37 = arange(v36, dtype=torch.int32, device=cpu)
v38 = scatter_moe.parallel_linear(v32, [output_linear_weight], v37, v35, 1, True, True, [], False)
v39 = getitem(v17, (slice(None, None, None), None))
v40 = mul(v38, v39)
v41 = zeros((24, 16), dtype=torch.float32, device=cpu)
v42 = .index_add(v41, 0, v15, v40)
v43 = .view(v42, (2, 12, 16))
return (v43)""",
        )
