"""How well each rule learns per token, per byte and per hour."""
