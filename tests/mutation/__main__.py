"""`make mutation`: plant every bug, and say how many are found and named.

python tests/mutation [NAME…]          # exit status 1 below 95 % found or 80 % named
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded anywhere
sys.path.insert(0, str(Path(__file__).parents[1]))

from mutation.hunt import FOUND, NAMED, hunt
from mutation.mutants import HEALTHY, MUTANTS


def main(names: list[str]) -> int:
    chosen = [m for m in (*MUTANTS, *HEALTHY) if not names or m.name in names]
    verdict = hunt(chosen, tell=lambda line: print(line, flush=True))
    print(verdict.text())
    return 0 if verdict.found >= FOUND and verdict.named >= NAMED and not verdict.alarms else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
