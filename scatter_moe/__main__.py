"""`python -m scatter_moe` is the command `scatter-moe`."""

import sys

from scatter_moe.cli import main

if __name__ == "__main__":
    sys.exit(main())
