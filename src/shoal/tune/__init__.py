"""Searches a space of recipes with trials in parallel, and gives the best recipe. Empty in this
version.
"""
