"""`python -m crosscoder` is the `crosscoder` command."""

import sys

from crosscoder.cli import main

sys.exit(main())
