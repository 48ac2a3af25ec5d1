"""Estimated memory of a step against measured processes."""
