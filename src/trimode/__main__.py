"""`python -m trimode` is `trimode`."""

import sys

from trimode.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
