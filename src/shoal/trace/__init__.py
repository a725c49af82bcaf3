"""Turns an `nn.Module` into the values of `shoal.graph`, under fake tensors, and measures its
blocks when asked. Empty in this version.
"""
