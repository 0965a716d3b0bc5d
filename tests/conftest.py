"""Lets the files here import `restate`, whatever the import mode; one thread a worker, as `make test` has
it."""

import os
import sys
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is there: threads of two workers on two cores starve each other
sys.path.insert(0, str(Path(__file__).parent))
