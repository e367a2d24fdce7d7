"""What a network costs: parameters, operations, latency, memory."""
