"""``python -m fxreuse``: the command line."""

import sys

from .command.cli import main

sys.exit(main())
