"""Terms of the losses, and their weighted sums."""
