"""`python -m adamerge` is the `adamerge` command."""

import sys

from adamerge.cli import main

if __name__ == "__main__":
    sys.exit(main())
