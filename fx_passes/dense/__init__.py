"""Experts that each compute all tokens, one after the other, where a weighted sum keeps what was chosen.

`columns` finds the weight that belongs to one expert, `sums` adds of weighted outputs, `stacks` the sum over stacked
outputs, and `token_body` has the body that all experts share. Tokens may be counted by more than one dim.

T tokens, K experts per token, E experts, D model width.
"""
