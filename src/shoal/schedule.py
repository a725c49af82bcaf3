"""A pipeline schedule as a table (rank × time of actions): made, validated and timed here. The
planner simulates the same table that the runtime runs, so that the two can't disagree. Empty in
this version.
"""
