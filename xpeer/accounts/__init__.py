"""The cost of privacy: the accountant, the ledger of a home, the register of a machine, reports.

Knows no tensors and no models.
"""
