"""What we claim, and how to check it: `python -m benchmarks.NAME`."""
