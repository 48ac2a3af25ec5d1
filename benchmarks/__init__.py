"""What xpeer claims, measured: `python -m benchmarks.NAME [--quick]`; see docs/benchmarks.md."""
