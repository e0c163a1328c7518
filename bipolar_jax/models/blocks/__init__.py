"""Blocks of a decoder layer: attention, feed-forward, norms, positions, and the operations that fuse them."""
