"""Dropout whose masks do not depend on the split: a counter-based generator instead of a state.

    key = StepKey(seed=0)
    use_counted_dropout(model, key)
    key.begin(step, rows, rank)
    with counted(key, model):
        outputs = model(inputs)                # same rows, same masks, anywhere

The keep-or-drop of one element is a hash of (seed, step, path of the module, kind and number of its
call in this step, position of the example in the global batch, index of the element in its
example), so the same elements drop on one device and on any number of ranks, in layers, in
functions, in a traced graph and in a piece of a tensor; and a resumed run needs no generator's
state.

Noise (`torch.randn`, `rand`, `bernoulli`, … with a dimension of the examples) is counted likewise
in a model that runs as it is. What else draws from torch's generator (`multinomial`, dropout within
an LSTM) is seeded anew at each step by (seed, step, rank): that can be repeated and resumed, but
depends on the split, so it is refused by name on several ranks and in microbatches. In a traced
graph all that is not dropout is refused.
"""

from shoal.parallel.randomness.functional import counted, intercepting, replaying, run_within
from shoal.parallel.randomness.graph import use_counted_randomness
from shoal.parallel.randomness.key import Moment, StepKey
from shoal.parallel.randomness.layers import CountedDropout, use_counted_dropout
from shoal.parallel.randomness.masks import Cut, Place, chosen, dropped

__all__ = [
    "CountedDropout",
    "Cut",
    "Moment",
    "Place",
    "StepKey",
    "chosen",
    "counted",
    "dropped",
    "intercepting",
    "replaying",
    "run_within",
    "use_counted_dropout",
    "use_counted_randomness",
]
