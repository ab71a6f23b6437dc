"""The hospital's part of a run."""
