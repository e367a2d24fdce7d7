"""Measurements of what a network costs: parameters, operations, latency, memory."""
