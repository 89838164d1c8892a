"""Benchmarks of mlx_lowbit: ``python -m benchmarks`` in the repository root.

``cases`` says what is timed, ``operands`` makes the arrays and the float64 reference, ``baselines``
runs one case with one library, ``timing`` is the clock, ``measure`` makes a row of all this,
``report`` prints it and writes JSON, ``plot`` draws.
"""

import os
import sys
from pathlib import Path

# The bandwidth probe and the float64 reference bring their own threads; OpenBLAS reads this when
# numpy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# The one float64 decoder of the repository is the tests'; they import it by this name too.
sys.path.append(str(Path(__file__).parent.parent / "tests"))
