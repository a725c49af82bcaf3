"""A model that two replicas cannot hold, and two ranks that share it can.

    python examples/does_not_fit.py                       # dp2 fails, dp2/zero3 and pp2 train
    python examples/does_not_fit.py dp2/zero3             # one strategy of your choice

AdamW keeps 16 bytes a parameter in float32: weight, gradient and two moments. A replica needs 4
more for gradients on their way to another one, and a checkpoint is copied, 12 bytes, before it is
written. Each rank may have 21 bytes a parameter here, beside what Python and torch need before
there is a model: too little for a whole replica, enough for half of one.

The limit is RLIMIT_DATA, which ranks inherit from this process: it counts what a process may write
to and shares with nobody. RLIMIT_AS would count the hundreds of megabytes of torch's libraries too,
and the memory that ranks share.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import shoal

WIDTHS = [2048] * 7
PARAMETERS = 64 * 2048 + 6 * 2048 * 2048  # and some biases
BYTES_A_PARAMETER = 21
BEFORE = "import sklearn.datasets, torch, shoal.train.rank"


def recipe() -> shoal.Recipe:
    return shoal.Recipe(
        name="does-not-fit",
        batch_size=64,
        steps=4,
        model={"name": "mlp", "widths": WIDTHS},
        data={"train": "digits:train"},
        objective="cross_entropy",
        optimizer={"name": "adamw", "lr": 1e-4},
    )


def bytes_before_the_model() -> int:
    """What a process holds that has imported what a rank imports."""
    code = f"{BEFORE}\nprint(open('/proc/self/status').read().split('VmData:')[1].split()[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout)


def train_within(limit: int, strategy: str) -> str:
    """How training ends on ranks of at most `limit` bytes each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        with tempfile.TemporaryDirectory() as folder:
            shoal.train(recipe(), strategy, out=Path(folder) / "run")
            return "trained"
    except shoal.errors.ShoalError as error:
        return f"failed: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def main(strategies: list[str]) -> None:
    limit = bytes_before_the_model() + BYTES_A_PARAMETER * PARAMETERS
    print(f"{PARAMETERS / 1e6:.0f} million parameters, {limit / 2**20:.0f} MiB for each rank")
    for strategy in strategies:
        print(f"{strategy}: {train_within(limit, strategy)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["dp2", "dp2/zero3", "pp2"])
