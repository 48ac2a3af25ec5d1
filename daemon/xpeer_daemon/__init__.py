"""The daemon: the long-lived process of a node. It has no model and opens no text."""
