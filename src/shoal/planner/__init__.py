"""Predicts time, memory and bytes of a strategy on a cluster; searches, explains, simulates in
virtual time, and validates itself on published rows. No torch. In this version: where a pipeline
is cut (`partition`).
"""
