"""From shard to checkpoint: the model, the text, the local loop, mixing, the trainer process."""
