"""The training loop: step, evaluate, commit, stop; and the run that remembers it.

run = train(recipe, strategy="dp2")          # starts the ranks, shows progress, returns the run
"""

from shoal.callable_module import make_callable
from shoal.train.ended import Ended
from shoal.train.folder import Options
from shoal.train.front import train, train_with

__all__ = ["Ended", "Options", "train", "train_with"]

make_callable(__name__, train)
