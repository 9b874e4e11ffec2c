"""`python -m mball.cli`, the same as the command `mball`."""

from __future__ import annotations

import sys

from mball.cli import main

sys.exit(main())
