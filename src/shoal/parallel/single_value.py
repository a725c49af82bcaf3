"""The error for a statistics group of a single value: its output would be a constant."""

from shoal.errors import RunError


def refuse_single(group: int) -> RunError:
    """To raise where statistics group `group` holds one value per channel."""
    return RunError(
        f"batch norm: statistics group {group} holds one value per channel, at least 2 are needed",
        hint="Choose a batch size (or `normalize_over`) that leaves no group of a single example, "
        "or a model with group norm.",
    )
