"""The modules that start both sides of a federation: Flower's processes, keys, the gateway, the simulation."""
