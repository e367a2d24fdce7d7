"""Parse every YAML and TOML file named on the command line; say which one does not parse."""

import sys
import tomllib
from pathlib import Path

import yaml

PARSERS = {".toml": tomllib.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}


def main() -> int:
    """Return the number of files that do not parse."""
    broken = 0
    for file in map(Path, sys.argv[1:]):
        try:
            PARSERS[file.suffix](file.read_text())
        except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
            print(f"{file}: {error}")
            broken += 1
    return broken


if __name__ == "__main__":
    sys.exit(main())
