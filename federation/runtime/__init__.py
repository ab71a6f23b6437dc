"""Flower's processes, keys, the gateway, the simulation: what starts both sides of a federation."""
