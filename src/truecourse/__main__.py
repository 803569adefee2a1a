"""`python -m truecourse` is the command `truecourse`."""

import sys

from truecourse.cli import main

sys.exit(main())
