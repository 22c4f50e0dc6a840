"""Kernels of the mixture-of-experts operators and their launchers; knows nothing of torch.library or of graphs.

`reference` is the specification, `cpu` and `cuda` are its fast implementations, `checks` reports wrong arguments.
The three implementations have the same functions with the same signatures, named like the operators.
"""
