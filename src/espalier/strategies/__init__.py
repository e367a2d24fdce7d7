"""How training is spread over devices: strategies, precision, cluster environments."""
