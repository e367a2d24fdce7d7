"""Evaluation of a trained network: predictions, errors, corruptions, attacks."""
