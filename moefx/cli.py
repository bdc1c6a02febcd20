"""The command line.

python -m moefx explain mixtral              what moefx would do to a model, and why
python -m moefx explain package.file:build   the same for a function that returns a model
python -m moefx demo                         train a model as it is and optimised, side by side
python -m moefx calibrate                    measure what work costs on this machine
python -m moefx simulate --model mixtral ... what its MoE layers would cost on a cluster, and why
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import moefx
from moefx import timeline as draw
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

    _calibrate_arguments(commands)
    _simulate_arguments(commands)
    return parser


def _calibrate_arguments(commands: Any) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="measure products, copies, codecs and collectives on this machine",
        description="Fit seconds = alpha + beta * units for each kind of work: five runs a size, robust least squares on "
        "half of the sizes, the error on the other half is printed. The profile is kept for `simulate`. On a GPU also the tiles "
        "of the kernels are compared, and the fastest kept for every later `optimize`.",
    )
    calibrate.add_argument(
        "--ranks", type=_positive, default=1, metavar="P", help="processes for collectives (default 1)"
    )
    calibrate.add_argument("--device", choices=("cpu", "cuda"), help="default: CUDA where there is one")
    calibrate.add_argument("--scale", type=_positive_float, default=1.0, metavar="X", help="sizes times X (default 1)")
    where = "write the costs there and compare no tiles (default: the user's cache folder)"
    calibrate.add_argument("--out", type=Path, metavar="FILE", help=where)
    calibrate.set_defaults(command=_calibrate)


def _simulate_arguments(commands: Any) -> None:
    simulate = commands.add_parser(
        "simulate",
        help="what MoE layers would cost on a cluster: best degrees, times, gains, and why",
        description="Times of a model's MoE layers on a cluster that need not exist. Give a model or sizes, and the costs: "
        "a published cluster, a calibrated profile, or the data sheet of a cluster.",
    )
    model = simulate.add_argument_group("model (--model, or all sizes)")
    model.add_argument("--model", metavar="NAME", help="a Hugging Face configuration such as mixtral, at its own sizes")
    for flag, what in (("d-model", "D"), ("d-expert", "F"), ("experts", "E"), ("top-k", "K")):
        model.add_argument(f"--{flag}", type=_positive, metavar=what)
    model.add_argument("--layers", type=_positive, metavar="N", help="MoE layers (default: the model's, else 1)")
    model.add_argument("--matrices", type=int, choices=(2, 3), help="an expert's matrices (default 3: gated)")
    model.add_argument("--shared", type=_positive, metavar="S", help="width of a shared expert")
    model.add_argument("--batch", type=_positive, default=4, metavar="B", help="samples a rank (default 4)")
    model.add_argument("--length", type=_positive, default=4096, metavar="L", help="tokens a sample (default 4096)")
    model.add_argument("--capacity-factor", type=_positive_float, default=1.0, metavar="f", help="default 1")
    model.add_argument(
        "--gradient-mb", type=_positive_float, metavar="MB", help="a layer's other gradients, all-reduced"
    )
    cluster = simulate.add_argument_group("cluster (--preset, --profile, or all of the data sheet)")
    cluster.add_argument("--ranks", type=_positive, default=64, metavar="P", help="default 64")
    cluster.add_argument("--ranks-per-node", type=_positive, default=1, metavar="G", help="default 1")
    cluster.add_argument("--preset", metavar="NAME", help="pipemoe-16, pipemoe-32, pipemoe-64, fsmoe-32")
    cluster.add_argument("--profile", type=Path, metavar="FILE", help="a file of `moefx calibrate`")
    for flag, metavar, what in (
        ("tflops", "X", "1e12 FLOP/s that the experts reach"),
        ("memory-gbps", "X", "1e9 bytes/s of device memory"),
        ("inter-gbps", "X", "1e9 bytes/s a rank between nodes"),
        ("intra-gbps", "X", "1e9 bytes/s a rank within a node"),
        ("launch-us", "US", "start-up of a kernel"),
        ("collective-us", "US", "start-up of a collective"),
    ):
        cluster.add_argument(f"--{flag}", type=_positive_float, metavar=metavar, help=what)
    cluster.add_argument("--bytes", type=_positive, default=2, metavar="b", help="bytes an element (default 2)")
    cluster.add_argument("--codec", type=_positive_float, metavar="X", help="compress what is sent, X times")
    simulate.add_argument("--policy", default="auto", metavar="NAME", help="schedule policy (default auto)")
    simulate.add_argument("--up-to", type=_positive, metavar="P", help="also every power of two up to P, with a plot")
    simulate.add_argument("--out", type=Path, metavar="DIR", help="write Gantt charts, HTML, traces and the plot")
    simulate.set_defaults(command=_simulate)


def _positive_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"a positive number is needed; got {text!r}")
    return number


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


def _calibrate(arguments: argparse.Namespace) -> int:
    from moefx import calibrate

    profile = calibrate.calibrate(arguments.device, arguments.ranks, arguments.scale)
    print(profile)
    print(f"saved to {profile.save(arguments.out)}")
    if arguments.device != "cpu" and torch.cuda.is_available() and arguments.out is None:
        from moefx.calibrate_tiles import calibrate_tiles

        tiles = calibrate_tiles()
        print(f"\n{tiles}\nsaved to {tiles.save()}")
    return 0


def _simulate(arguments: argparse.Namespace) -> int:
    from moefx import whatif
    from moefx.calibrate import progress

    layers = _layers(arguments)
    profile = _profile(arguments)
    notes: list[str] = []
    ranks = [arguments.ranks]
    if arguments.up_to:
        ranks = sorted({*ranks, *(1 << i for i in range(1, 64) if 1 << i <= arguments.up_to)})
    if profile.ranks not in (1, *ranks) or len(ranks) > 1 and profile.ranks > 1:
        notes.append(f"alpha and beta are those of {profile.ranks} ranks, held for every P")

    def scenario(count: int) -> whatif.Scenario:
        node = min(arguments.ranks_per_node, count)
        share = 1 / arguments.codec if arguments.codec else 1.0
        cluster = whatif.Cluster(profile, count, node, arguments.bytes, share)
        tokens, gradients = arguments.batch * arguments.length, 1e6 * (arguments.gradient_mb or 0.0)
        return whatif.Scenario(layers[0], cluster, tokens, arguments.capacity_factor, gradients)

    outcomes = [whatif.evaluate(scenario(count), arguments.policy) for count in progress(ranks, "clusters", "cluster")]
    main_outcome = outcomes[ranks.index(arguments.ranks)]
    layer = layers[0]
    name = arguments.model or "layer"
    print(
        f"{name}: {len(layers)} MoE layer(s), D={layer.d_model} F={layer.d_expert} E={layer.experts} K={layer.top_k}, "
        f"{layer.matrices} matrices an expert, shared width {layer.shared_width}, "
        f"{main_outcome.scenario.tokens} tokens a rank, r <= {main_outcome.scenario.sizes.capacity}"
    )
    print(f"{profile}\n")
    for note in dict.fromkeys([*notes, *(f"not simulated: {what}" for o in outcomes for what in o.scenario.left_out)]):
        print(f"note: {note}")
    print(whatif.table(outcomes, len(layers)) + "\n")
    lines: list[str] = []
    for phase in whatif.PHASES:
        lines += whatif.why(main_outcome.scenario, phase, main_outcome.choices[phase], arguments.policy)
    print("\n".join(lines) + "\n")
    for phase in whatif.PHASES:
        print(draw.gantt(main_outcome.choices[phase].timeline) + "\n")
    if arguments.out:
        print("written " + ", ".join(map(str, _write(main_outcome, outcomes, len(layers), name, lines, arguments.out))))
    return 0


def _write(outcome: Any, outcomes: Sequence[Any], layers: int, name: str, lines: list[str], out: Path) -> list[Path]:
    """Write the charts of one outcome, and the plot over P where there are several."""
    _needs("matplotlib")
    from moefx import whatif

    out.mkdir(parents=True, exist_ok=True)
    timelines = [outcome.choices[phase].timeline for phase in whatif.PHASES]
    files = [draw.png(timeline, out / f"{timeline.graph.phase}.png") for timeline in timelines]
    for timeline in timelines:
        files.append(out / f"{timeline.graph.phase}.trace.json")
        files[-1].write_text(draw.chrome_trace(timeline), encoding="utf-8")
    files.append(out / "timeline.html")
    heading = f"{name} on {outcome.scenario.cluster.ranks} ranks"
    files[-1].write_text(draw.html(timelines, heading, lines), encoding="utf-8")
    if len(outcomes) > 1:
        files.append(whatif.plot(outcomes, layers, name, out / "ranks.png"))
    return files


def _layers(arguments: argparse.Namespace) -> list[Any]:
    """The MoE layers that the arguments describe; all alike."""
    from moefx import whatif

    sizes = {name: getattr(arguments, name) for name in ("d_model", "d_expert", "experts", "top_k")}
    if arguments.model:
        _needs("transformers")
        layers = whatif.from_hugging_face(arguments.model)
        count, layer = len(layers), replace(layers[0], **{name: value for name, value in sizes.items() if value})
    else:
        missing = [f"--{name.replace('_', '-')}" for name, value in sizes.items() if not value]
        if missing:
            raise InputError(f"give --model, or all sizes; missing: {', '.join(missing)}")
        count, layer = 1, whatif.Layer(**sizes)
    if arguments.matrices:
        layer = replace(layer, matrices=arguments.matrices)
    if arguments.shared:
        layer = replace(layer, shared_width=arguments.shared)
    return [layer] * (arguments.layers or count)


def _profile(arguments: argparse.Namespace) -> Any:
    """The profile that the arguments name; exactly one of the three ways to name one."""
    from moefx import profile

    sheet = ("tflops", "memory_gbps", "inter_gbps", "intra_gbps", "launch_us", "collective_us")
    given = {name: getattr(arguments, name) for name in sheet if getattr(arguments, name)}
    ways = [bool(arguments.preset), bool(arguments.profile), bool(given)]
    if sum(ways) != 1:
        raise InputError("give one of --preset, --profile, or a data sheet (--tflops and the like)")
    if arguments.preset:
        return profile.preset(arguments.preset)
    if arguments.profile:
        return profile.Profile.load(arguments.profile)
    if missing := [f"--{name.replace('_', '-')}" for name in sheet if name not in given]:
        raise InputError(f"a data sheet needs all of its numbers; missing: {', '.join(missing)}")
    return profile.from_links("a cluster given by its data sheet", ranks=1, **given)


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
