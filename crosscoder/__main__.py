"""`python -m crosscoder` is the `crosscoder` command."""

import sys


def main() -> int:
    """Entry point of the console command; signals are watched before anything slow is imported."""
    from crosscoder.foundation.signals import watching

    with watching(exits=True):
        from crosscoder.cli import main as run

        return run()


if __name__ == "__main__":
    sys.exit(main())
