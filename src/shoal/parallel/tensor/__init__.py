"""Tensor parallelism for any traced model, by analysis of its graph.

made = plan(traced, ranks, model)                    # which dimensions of which parameters
cut_model(made, model, group.rank)                   # in place
mine = apply(made, traced, model, group)             # the graph of this rank

relation.py, rules.py, relate.py (layers, shapes, reductions)
                                              what an operation does with its dimensions
axes.py, classes.py, choose.py                which dimensions belong together; which are cut
split.py, rewrite.py, operation.py, nodes.py  the graph of one rank
plan.py, cutting.py, counting.py              the plan, carried out; its bytes
sequence.py                                   parts of sequences between cut layers
vocabulary.py                                 cross-entropy of scores that are never gathered
"""

from shoal.parallel.tensor.counting import comm_bytes, loss_bytes
from shoal.parallel.tensor.cutting import apply, cut_model
from shoal.parallel.tensor.plan import TensorPlan, nothing, plan
from shoal.parallel.tensor.sequence import cut_sequences
from shoal.parallel.tensor.vocabulary import CutScores, gather_outputs, wrap

__all__ = [
    "CutScores",
    "TensorPlan",
    "apply",
    "comm_bytes",
    "cut_model",
    "cut_sequences",
    "gather_outputs",
    "loss_bytes",
    "nothing",
    "plan",
    "wrap",
]
