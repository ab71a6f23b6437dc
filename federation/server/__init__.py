"""The server's part of a run: the round loop and what it is made of."""
