"""A whole training in one place, and what a run takes: time, memory, electricity."""
