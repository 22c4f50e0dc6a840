"""Naive Mixture-of-Experts blocks as people write them: the programs which the rewrite must find."""

from tests.zoo import (
    bodies,
    deepseek,
    dense,
    dense_modules,
    dense_sequences,
    flat,
    gathered,
    gpt_oss,
    listed,
    loops,
    masks,
    mixtral,
    numbers,
    others,
    parameters,
    qwen,
    segments,
    sequences,
    sorted_slots,
    stacked,
    switch_lists,
    temporaries,
    views,
    without_parameters,
)
from tests.zoo.case import Case
from tests.zoo.common import hidden_states

ZOO: tuple[Case, ...] = (
    *mixtral.CASES,
    *qwen.CASES,
    *deepseek.CASES,
    *stacked.CASES,
    *gpt_oss.CASES,
    *others.CASES,
    *loops.CASES,
    *numbers.CASES,
    *listed.CASES,
    *masks.CASES,
    *switch_lists.CASES,
    *sequences.CASES,
    *flat.CASES,
    *bodies.CASES,
    *parameters.CASES,
    *views.CASES,
    *temporaries.CASES,
    *segments.CASES,
    *sorted_slots.CASES,
    *gathered.CASES,
    *dense.CASES,
    *dense_modules.CASES,
    *dense_sequences.CASES,
    *without_parameters.CASES,
)

__all__ = ["ZOO", "Case", "hidden_states"]
