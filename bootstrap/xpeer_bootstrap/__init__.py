"""The bootstrap node: an entry point of the DHT. It can't read what it holds."""
