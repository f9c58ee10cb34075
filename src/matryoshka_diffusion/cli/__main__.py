"""`python -m matryoshka_diffusion.cli` is `mdm`."""

import sys

from matryoshka_diffusion.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
