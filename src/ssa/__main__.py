"""``python -m ssa``, which is also how ``torchrun -m ssa`` starts the command."""

import sys

from ssa.cli import main

sys.exit(main())
