"""What a scan looks like: features that the cache stores, and the doubts about a scan that is unlike the
training images."""
