"""What was measured, for people: tables, figures, pages, comparisons, and words on the terminal."""
