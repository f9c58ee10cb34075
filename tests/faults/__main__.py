"""`python -m faults`."""

import sys

from faults.runner import main

if __name__ == "__main__":
    sys.exit(main())
