"""What a scan looks like: features that the cache stores, and the doubts about a scan that differs from the
training images."""
