"""Shows results to people: tables, figures, pages, comparisons, and text on the terminal."""
