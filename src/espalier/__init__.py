"""Train, compress, measure and ship neural networks."""
