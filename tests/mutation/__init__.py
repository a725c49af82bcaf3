"""Bugs of the kinds that people meet, planted on the ranks; does `verify` find and name them?"""
