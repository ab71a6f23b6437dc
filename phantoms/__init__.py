"""Synthetic patients, for tests and first tries without any real scan."""
