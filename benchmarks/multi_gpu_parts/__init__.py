"""The parts of benchmarks/multi_gpu.py: what a worker does, in a process group, for its rank."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
