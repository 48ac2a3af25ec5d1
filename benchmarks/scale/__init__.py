"""Messages, bytes, CPU per peer and time to consensus against the number of peers."""
