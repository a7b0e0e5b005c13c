"""Quantisers, the two pretraining networks, weights in and out, optimisers."""
