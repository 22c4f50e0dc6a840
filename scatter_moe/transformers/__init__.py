"""transformers 5.x: the experts implementation "scatter_moe".

    import scatter_moe
    model.set_experts_implementation("scatter_moe")
    AutoModelForCausalLM.from_pretrained(..., experts_implementation="scatter_moe")

It serves every class that transformers decorates with `@use_experts_implementation`. Importing this imports nothing of
transformers: the implementation is registered once transformers' own registry has been imported (docs/adr/0004).
"""

from scatter_moe.transformers.experts import experts_forward, fp8_experts_forward
from scatter_moe.transformers.registry import register_when_imported

__all__ = ["experts_forward", "fp8_experts_forward", "register_when_imported"]
