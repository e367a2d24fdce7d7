"""What a trained network answers, and how it fails: predictions and errors."""
