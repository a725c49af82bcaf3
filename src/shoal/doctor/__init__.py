"""Tells what this machine can do, by measuring it, and what a run hangs on.

Empty in this version.
"""
