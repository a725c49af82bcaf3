"""The types that a verification can be in, by name; no torch."""

from typing import Any

from shoal.errors import UsageError

NAMES = {"float64": "float64", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16"}


def dtype_name(dtype: Any, *, bf16: bool) -> str:
    """`float64`, `float32` or `bfloat16` of a torch type, its name or None.

    ``bf16``: whether the strategy says so, which is what None stands for. Raises `UsageError`.
    """
    if dtype is None:
        return "bfloat16" if bf16 else "float64"
    given = str(dtype).removeprefix("torch.")
    if given not in NAMES:
        raise UsageError(
            f"dtype {given}: verification is in float64, float32 or bf16",
            hint="Leave dtype out for float64, or for bf16 with a strategy that says +bf16.",
        )
    name = NAMES[given]
    if bf16 and name != "bfloat16":
        raise UsageError(
            f"dtype {name} and +bf16 contradict each other",
            hint="Leave +bf16 out of the strategy, or dtype out of the call.",
        )
    return name
