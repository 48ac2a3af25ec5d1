"""One hostile member with a valid certificate among three honest daemons."""
