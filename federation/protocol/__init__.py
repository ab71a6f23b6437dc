"""What server and hospital agree on: messages, settings, weights on their way, the arithmetic of secure
aggregation."""
