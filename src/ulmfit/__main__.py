"""`python -m ulmfit VERB key=value ...` does what the console script `ulmfit` does."""

import sys

from ulmfit.cli import main

if __name__ == "__main__":
    sys.exit(main())
