"""`python -m moefx`: see `moefx.cli`."""

import sys

from moefx.cli import main

if __name__ == "__main__":
    sys.exit(main())
