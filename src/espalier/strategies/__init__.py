"""Lightning's strategies, precision and cluster environments, as this project needs them."""
