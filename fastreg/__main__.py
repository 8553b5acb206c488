"""`python -m fastreg` is `fastreg`."""

import sys

from .cli import main

sys.exit(main())
