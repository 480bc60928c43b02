"""`python -m mindseed` is the command `mindseed`."""
import sys

from mindseed.cli import main

sys.exit(main())
