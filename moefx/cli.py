"""The command line.

python -m moefx explain mixtral              what moefx would do to a model, and why
python -m moefx explain package.file:build   the same for a function that returns a model
python -m moefx demo                         train a model as it is and optimised, side by side
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

import moefx
from moefx.errors import InputError, MoefxError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 the demo's check failed, 2 wrong arguments."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        exit_code: int = arguments.command(arguments)
    except MoefxError as error:
        print(f"moefx: error: {error}", file=sys.stderr)
        return 2
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moefx", description="Finds and optimises Mixture-of-Experts blocks.")
    parser.add_argument("--version", action="version", version=f"moefx {moefx.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    explain = commands.add_parser(
        "explain",
        help="print the blocks that moefx finds in a model, and why it declines others",
        description="Print the blocks that moefx finds in a model, their plans, and why it declines others. "
        "The model of a Hugging Face name is built tiny, with random weights; nothing is downloaded.",
    )
    explain.add_argument(
        "target",
        metavar="TARGET",
        help="a Hugging Face model type such as mixtral, or module:callable, which returns a model "
        "or (model, example_inputs)",
    )
    explain.add_argument("--tokens", type=_positive, default=64, metavar="N", help="tokens in the example (default 64)")
    explain.add_argument("--degree", type=_positive, default=1, metavar="R", help="pipeline degree (default 1)")
    explain.set_defaults(command=_explain)

    demo = commands.add_parser(
        "demo",
        help="train a small Qwen3-MoE as it is and optimised, and compare",
        description="Train a small Qwen3-MoE on text that Python ships, once as it is and once optimised, step by step "
        "in turn; print and plot both losses and step times. Exit code 1 if the final losses differ.",
    )
    demo.add_argument("--steps", type=_positive, default=300, metavar="N", help="training steps (default 300)")
    demo.add_argument("--degree", type=_positive, default=1, metavar="R", help="pipeline degree (default 1)")
    demo.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder for files (default ./out)")
    demo.set_defaults(command=_demo)
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"a whole number >= 1 is needed; got {text!r}")
    return number


def _explain(arguments: argparse.Namespace) -> int:
    model, example_inputs = load_target(arguments.target, arguments.tokens)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{arguments.target}: {type(model).__name__}, {parameters:,} parameters\n")
    print(moefx.explain(model, example_inputs, moefx.Options(degree=arguments.degree)))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    _needs("transformers", "matplotlib", "tqdm")
    from moefx import demo

    return demo.run(arguments.steps, arguments.out, moefx.Options(degree=arguments.degree))


def load_target(target: str, tokens: int) -> tuple[nn.Module, Any]:
    """Return the model that a TARGET of the command line names, and example inputs for it."""
    if ":" in target:
        model, inputs = _call(target)
        if inputs is not None:
            return model, inputs
        if not hasattr(model, "main_input_name"):
            raise InputError(f"{target} returned a model alone; let it return (model, example_inputs)")
        from moefx import hf
    else:
        _needs("transformers")
        from moefx import hf

        try:
            model = hf.tiny_model(target)
        except MoefxError:
            raise
        except Exception as error:
            raise InputError(
                f"{target} cannot be built tiny ({type(error).__name__}: {error}); "
                "write a function that returns (model, example_inputs) and give module:callable"
            ) from error
    return model, hf.example_inputs(model, tokens)


def _call(target: str) -> tuple[nn.Module, Any]:
    """Import and call `module:callable`; return the model and its example inputs, None where it gives none."""
    module_name, _, attribute = target.partition(":")
    if os.getcwd() not in sys.path:  # `python -m` puts it there, the `moefx` command does not
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"{target}: cannot import {module_name!r}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        near = difflib.get_close_matches(attribute, [name for name in vars(module) if callable(vars(module)[name])])
        hint = f"; near matches: {', '.join(near)}" if near else ""
        raise InputError(f"{target}: {module_name} has no callable {attribute!r}{hint}")
    result = function()
    model, inputs = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        raise InputError(f"{target} must return a torch.nn.Module or (model, example_inputs); got {type(model)}")
    return model, inputs


def _needs(*packages: str) -> None:
    """Refuse in words where a package of the `demo` extra is missing."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(f"this command needs {package}: pip install 'moefx[demo]'") from error
