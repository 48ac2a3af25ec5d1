"""Clipping, noise, the accountant and the ledger."""
