"""How tests start a server in a process of its own."""

import sys

SERVE = (sys.executable, "-m", "trimode", "serve")
