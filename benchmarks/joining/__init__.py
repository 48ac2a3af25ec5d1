"""What it costs donors to give a model of full size to a joiner, and what it takes the joiner.

Whole daemons on hosts of their own (network namespaces). The joiner's link is shaped, in both
directions. One donor is killed when the joiner has half of the parameters.
"""
