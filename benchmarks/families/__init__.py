"""Whether a whole run works with models of each family of transformers."""
