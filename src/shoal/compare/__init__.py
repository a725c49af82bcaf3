"""Runs several strategies of one recipe side by side, fairly, and gives one table and one report.
Empty in this version.
"""
