"""A shard's way to tokens: how fast, in how much memory, and how long the next start takes."""
