"""Who meets whom, when, and what came of it: the daemon's half of exchanges, without a model."""
