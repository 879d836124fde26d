"""`python -m polysense`: the command line."""
import sys

from polysense.cli import main

sys.exit(main())
