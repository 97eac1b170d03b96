"""`python -m quarot`: the same as the command `quarot`."""

import sys

from quarot.cli import main

sys.exit(main())
