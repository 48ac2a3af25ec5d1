"""From the payloads of a meeting to a correction of the parameters. Knows no processes."""
