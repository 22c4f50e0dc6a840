"""Recognise, verify and rewrite naive Mixture-of-Experts layers in graphs of PyTorch.

    entry       the ways in: Dynamo backend, hook, export, Inductor's pass
    capture     helps Dynamo over naive loops
    graph       what is read off any graph
    facts       what routing tensors mean
    body        what one expert does to its rows; batched, dense: the same from other code
    modules     experts as Python objects
    forms       the naive forms, one file each
    rules       what must hold
    rewriting   the operators in place of the naive code

`pipeline` goes through them; `region` is what they hand to each other, `report` what they say.
"""
