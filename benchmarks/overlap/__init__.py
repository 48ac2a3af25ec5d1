"""Compute utilisation with exchanges beside the training, against the same trainer without them.

Two whole daemons on two hosts (network namespaces) with a shaped, delayed link between them. All is
real, the model's size included, but the step's computing: a step sleeps, and so holds no core.
"""
