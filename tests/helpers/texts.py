"""Short texts of two kinds, for tests that train on them."""

import csv
import random
from pathlib import Path

WORDS = {"good": ("fine", "great", "lovely", "bright"), "bad": ("poor", "dull", "awful", "grey")}
COMMON = ("the", "film", "was", "and", "a", "story", "of", "it", "very", "long")


def write(path: Path, num: int = 200, seed: int = 0) -> Path:
    """Write a CSV file with the columns `text` and `label`; a word or two tell the label, lengths are 3 to 20."""
    draw = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(num):
            label = ("good", "bad")[number % 2]
            words = draw.choices(COMMON, k=draw.randint(2, 18)) + draw.choices(WORDS[label], k=draw.randint(1, 2))
            draw.shuffle(words)
            writer.writerow([" ".join(words), label])
    return path
