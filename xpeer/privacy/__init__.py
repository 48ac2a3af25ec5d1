"""Private gradients: sampling, clipping, noise, and the mechanisms that charge for them."""
