"""What a trained network answers, and how it fails: predictions, errors, corruptions, attacks."""
