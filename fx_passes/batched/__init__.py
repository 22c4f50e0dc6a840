"""The expert body of code that keeps pairs of tokens and experts in dims of their own: the same body, on one row dim.

    [N, F], [T, K, F]       a row for each slot, with gathered weights: W[ids]
    [E, T, F], [T, E, F]    a row for each pair of expert and token

`rows` says of each node which of its dims count rows and what one row is, in the words of
`fx_passes.body.values`; `walk` goes through the nodes, with a file for each kind of step; `row_graph` has the nodes of
the body, in which dim 0 counts rows.

T tokens, K experts per token, N = T * K slots, E experts, M = E * T pairs.
"""
