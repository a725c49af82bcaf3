"""What whoever starts a run of few meetings should know.

warnings_of(Local(100), total_steps=20)     # ("local:100: the run has 20 steps: …",)
"""

from shoal.strategy import Agreement, DiLoCo, Easgd, Local


def warnings_of(way: Agreement, total_steps: int) -> tuple[str, ...]:
    """One for replicas that meet at the end of the run only, or never learn apart."""
    if isinstance(way, Local) and way.after >= total_steps:
        return (
            f"{way}: the run has {total_steps} steps, all before step {way.after}: replicas agree "
            "at each step, as under sync",
        )
    steps = total_steps - (way.after if isinstance(way, Local) else 0)
    if isinstance(way, Local | DiLoCo | Easgd) and way.every > steps:
        return (
            f"{way}: the run has {steps} steps of their own for replicas, fewer than "
            f"H={way.every}: they meet once, at its end",
        )
    return ()
