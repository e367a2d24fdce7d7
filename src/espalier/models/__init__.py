"""Networks in plain torch, one family per file, sized by the shape of one sample and the number of outputs."""
