"""A model as data: blocks, their parameters, FLOPs, bytes and activations, the live values between
them, and the pairs that tensor parallelism can cut. It is what tracing makes and what the planner
and the parallel replicas read, as plain values without torch. Empty in this version.
"""
