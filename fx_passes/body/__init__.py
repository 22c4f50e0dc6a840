"""The expert body: what one expert does to its rows, free of the code that it was written in.

`values` has its vocabulary. `unify` finds the one body of all experts of a loop, `segment_body` and `slot_body` that of
code over sorted rows, `fx_passes.batched` and `fx_passes.dense` that of code over whole tensors. `mlp_body` tells
whether it is what the fused operator computes.
"""
