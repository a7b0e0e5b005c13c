"""Items to tensors to views, and back to the grid of the file."""
