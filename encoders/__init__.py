"""The start of an encoder, and how an encoder learns from scans without masks."""
