"""The long-lived process on each cloud."""
