"""Kronecker-factored curvature: pure mathematics and where its data come from.

Nothing in here knows of optimizers or of pruning.
"""
