"""Experts as Python objects, without a graph: what their code computes, whether they are alike, who wrote to them."""
