"""What only the federated path needs; see README.md, section C."""
