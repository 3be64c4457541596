"""`python -m ddrf_fast` is the command `ddrf-fast`; torchrun starts it so."""

import sys

from ddrf_fast.cli import main

sys.exit(main())
