"""Generated images with labels, the data of the demo."""
