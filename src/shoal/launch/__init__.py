"""Run this function on n ranks. Knows nothing of training.

    supervisor ──task pipe──▶ rank 0 ──report pipe (JSON lines)──▶ supervisor
               ──task pipe──▶ rank 1 ──report pipe (JSON lines)──▶
                    └── an anonymous file for the rendezvous, one per rank for its last words

    with Ranks(2) as ranks:
        results = ranks.call(function, "an argument")     # function(context, "an argument") on each

Ranks are `python -m shoal.launch.worker`, each in a session of its own, and die with their
supervisor. Functions reach them by cloudpickle over an inherited pipe; nothing comes back but JSON.
"""

from shoal.launch.ahead import Ahead
from shoal.launch.context import Context, joined_context
from shoal.launch.failure import described
from shoal.launch.signals import StopSignals, stop_signals_heard, wait
from shoal.launch.supervisor import Ranks

__all__ = [
    "Ahead",
    "Context",
    "Ranks",
    "StopSignals",
    "described",
    "joined_context",
    "stop_signals_heard",
    "wait",
]
