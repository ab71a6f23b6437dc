"""What an encoder starts with, and how one learns from scans without masks."""
