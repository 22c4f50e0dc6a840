"""Integer arithmetic of launchers. Triton's versions are made for kernels and cost microseconds a call on the host."""


def cdiv(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def next_power_of_2(value: int) -> int:
    """1 for 0, as for 1."""
    return 1 << max(0, value - 1).bit_length()
