"""Ways to make samples worse, one per file: corruptions by chance and attacks on purpose."""
