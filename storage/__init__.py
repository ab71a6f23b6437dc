"""Files: written whole or not at all, and torch's files read without running their code."""
