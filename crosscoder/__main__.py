"""`python -m crosscoder` is the `crosscoder` command."""

import sys


def main() -> int:
    """Entry point of the console command; signals are watched before anything slow is imported."""
    from crosscoder.foundation.signals import watching

    try:
        with watching(exits=True):
            from crosscoder.cli import main as run

            status = run()
            sys.stdout.flush()
            return status
    except BrokenPipeError:
        from crosscoder.foundation.console import leave_unread, reader_is_gone

        if not reader_is_gone():
            raise
        return leave_unread()


if __name__ == "__main__":
    sys.exit(main())
