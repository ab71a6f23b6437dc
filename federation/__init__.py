"""What only the federated path needs: docs/federation.md starts one, docs/architecture.md shows how it works."""
