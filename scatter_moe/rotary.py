"""Rotary position embeddings of queries and keys.

B sequences, S positions, H heads, d head width.
"""

import torch
from torch import Tensor


def rotate(x_BHSd: Tensor, positions_BS: Tensor, theta: float) -> Tensor:
    """Rotates the pairs (i, i + d / 2) of each head by `position * theta ** (-2 i / d)`.

    Args:
        x_BHSd: queries or keys, any floating-point dtype; the angles are computed in fp32.
        positions_BS: integers `[B, S]` or `[1, S]`.
        theta: the base of the wavelengths, 10000 in the paper.

    Source: RoFormer (arXiv 2104.09864), with the halves of a head as pairs, as in Llama.
    """
    half = x_BHSd.shape[-1] // 2
    exponents = torch.arange(half, device=x_BHSd.device, dtype=torch.float32) / half
    angles_B1Sh = positions_BS[:, None, :, None].float() * theta**-exponents
    cos, sin = angles_B1Sh.cos().to(x_BHSd.dtype), angles_B1Sh.sin().to(x_BHSd.dtype)
    first, second = x_BHSd[..., :half], x_BHSd[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
