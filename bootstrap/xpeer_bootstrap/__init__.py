"""The bootstrap node: a DHT entry point that can read nothing."""
