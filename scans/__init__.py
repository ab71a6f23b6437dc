"""Scans on disk: what lies in a folder, which mask is whose, who the patients are, and how a volume lies in space."""
