"""Files: whole or not there, and those of torch without their code."""
