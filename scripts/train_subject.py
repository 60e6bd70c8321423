"""`crosscoder train-subject`, as a script: python scripts/train_subject.py --help."""

import sys

from crosscoder.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-subject", *sys.argv[1:]]))
