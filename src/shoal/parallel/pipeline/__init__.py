"""The staged replica: a model traced, cut into stages, and run by a table of actions.

    staging = Staging("1f1b", microbatches=8)
    replica = build_staged_replica(model, objective, numerics, groups, staging, inputs, seed=0)
    totals = replica.forward_backward(batch, step, share, start)

`forms` are traces cut into `chunk`s, `links` what stages send each other, `weights` backward passes
in two halves, `norms` batch norm in a graph, `tied` parameters that several stages hold.
"""

from shoal.parallel.pipeline.build import Staging, build_staged_replica
from shoal.parallel.pipeline.replica import StagedReplica

__all__ = ["StagedReplica", "Staging", "build_staged_replica"]
