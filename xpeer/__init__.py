"""xpeer: several clouds train one language model, without an aggregator."""

__version__ = "0.1.0"
