"""moefx: finds the Mixture-of-Experts blocks of a PyTorch model and replaces them by verified, scheduled plans.

    model = moefx.optimize(model)          # same object, same parameters, faster MoE blocks
    print(moefx.explain(model, example))   # what was found, what was declined, and why
    moefx.restore(model)                   # the original back

The letters used everywhere: T tokens, D model width, F expert hidden width, E experts, K experts per token,
P ranks, r pipeline degree (number of chunks).
"""

from pathlib import Path as _Path

# In a checkout the sub-packages live beside this folder (setup.cfg maps them); make them importable without an install.
_root = _Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file() and (_root / "passes" / "__init__.py").is_file():
    __path__.append(str(_root))

from moefx.api import explain, optimize, restore  # noqa: E402
from moefx.errors import MoefxError  # noqa: E402
from moefx.options import Options  # noqa: E402
from moefx.plugins import register_all_to_all, register_codec, register_policy  # noqa: E402
from moefx.report import Report  # noqa: E402

__all__ = [
    "MoefxError",
    "Options",
    "Report",
    "explain",
    "optimize",
    "register_all_to_all",
    "register_codec",
    "register_policy",
    "restore",
]
__version__ = "0.1.0"
