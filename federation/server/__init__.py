"""The server's part of a run: the round loop and its parts."""
