"""`crosscoder harvest`, as a script: python scripts/harvest.py --help."""

import sys

from crosscoder.cli import main

if __name__ == "__main__":
    sys.exit(main(["harvest", *sys.argv[1:]]))
