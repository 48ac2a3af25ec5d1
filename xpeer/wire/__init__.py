"""Bytes on their way to a partner: codecs, messages, sealed sessions. No IO."""
