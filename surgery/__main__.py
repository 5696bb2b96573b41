"""`python -m surgery`, the same as `surgery`."""

import sys

from surgery.cli import main

sys.exit(main())
