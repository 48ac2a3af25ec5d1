"""What bytes look like on the way to a partner: codecs, sealed sessions, messages."""
