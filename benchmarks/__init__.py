"""Benchmarks of the ops, of one training step and of whole models; run each as ``python -m benchmarks.<name>``."""
