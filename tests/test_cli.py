"""The command line: which model a TARGET names, what is said of a wrong one, and what the demo prints and writes."""

from __future__ import annotations

import copy
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_families import FAMILIES
from torch import nn

import moefx
from moefx import cli

pytest.importorskip("transformers")
from moefx import hf

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["llama", "gpt2", *FAMILIES])
def test_a_tiny_model_runs(name: str) -> None:
    model = hf.tiny_model("inkling_mm_model" if name == "inkling" else name)
    assert sum(parameter.numel() for parameter in model.parameters()) < 2e6
    with torch.no_grad():
        model(**hf.example_inputs(model, tokens=24))


def test_a_tiny_model_has_experts_and_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    first = hf.tiny_model("mixtral").state_dict()
    torch.manual_seed(2)
    second = hf.tiny_model("mixtral").state_dict()
    other = hf.tiny_model("mixtral", seed=1).state_dict()
    assert any(tensor.ndim == 3 and len(tensor) == hf.EXPERTS for tensor in first.values())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_example_inputs_have_the_asked_number_of_tokens() -> None:
    model = hf.tiny_model("mixtral")
    assert hf.example_inputs(model, 17)["input_ids"].shape == (1, 17)
    with pytest.raises(moefx.MoefxError, match="at most 4096 tokens"):
        hf.example_inputs(model, 5000)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace `moefx.explain` by one that notes its arguments."""
    calls: list[Any] = []

    def explain(model: nn.Module, example_inputs: Any = None, options: Any = None) -> str:
        calls.append((model, example_inputs, options))
        return "the report"

    monkeypatch.setattr(moefx, "explain", explain)
    return calls


TARGETS = """
import torch
def pair(): return torch.nn.Linear(3, 3), (torch.ones(2, 3),)
def alone(): return torch.nn.Linear(3, 3)
def hugging_face():
    from moefx import hf
    return hf.tiny_model("mixtral")
def nothing(): return 7
"""


@pytest.fixture
def targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the module `targets_of_test` importable from the current folder."""
    (tmp_path / "targets_of_test.py").write_text(TARGETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def test_explain_a_name(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "mixtral", "--tokens", "10", "--degree", "3"]) == 0
    ((model, inputs, options),) = asked
    assert type(model).__name__ == "MixtralForCausalLM"
    assert inputs["input_ids"].shape == (1, 10)
    assert options == moefx.Options(degree=3)
    assert capsys.readouterr().out.endswith("the report\n")


@pytest.mark.usefixtures("targets")
def test_explain_a_callable(asked: list[Any]) -> None:
    assert cli.main(["explain", "targets_of_test:pair"]) == 0
    assert cli.main(["explain", "targets_of_test:hugging_face", "--tokens", "5"]) == 0
    (model, inputs, _), (_, hugging_face_inputs, _) = asked
    assert isinstance(model, nn.Linear)
    assert inputs[0].shape == (2, 3)
    assert hugging_face_inputs["input_ids"].shape == (1, 5)


@pytest.mark.usefixtures("targets", "asked")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mixtrall", "near matches: mixtral"),
        ("qwen3-moee", "near matches: qwen3_moe"),
        ("zzzzzzzzzz", "CONFIG_MAPPING lists the names"),
        ("no_such_module:build", "cannot import 'no_such_module'"),
        ("targets_of_test:par", "near matches: pair"),
        ("targets_of_test:alone", "return (model, example_inputs)"),
        ("targets_of_test:nothing", "must return a torch.nn.Module"),
    ],
)
def test_a_wrong_target_is_explained(target: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", target]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["explain"], ["demo", "--steps", "0"], ["explain", "mixtral", "--degree", "x"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)


def test_explain_finds_the_blocks_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = cli.load_target("mixtral", 32)
    before = copy.deepcopy(model)
    report = moefx.explain(model, inputs)
    assert [(block.experts, block.top_k, block.d_model) for block in report.found] == [(8, 2, 64)] * 2
    assert repr(model) == repr(before)
    assert cli.main(["explain", "llama"]) == 0
    assert "0 MoE block" in capsys.readouterr().out


def test_the_quick_start_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    block, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), flags=re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.count("2 MoE block(s) found") == 2


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--steps", "3", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    for part in ("model.layers.3", "loss as it is", "step time", "generated  by the optimised model", "OK: final loss"):
        assert part in printed.out
    assert not printed.err, "no progress bar where the output is no terminal"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "def " in (tmp_path / "plan_0.py").read_text()
    assert "model.layers.3" in (tmp_path / "report.txt").read_text()


def test_demo_fails_when_the_losses_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimize = moefx.optimize

    @torch.no_grad()
    def wrong(model: nn.Module, *arguments: Any) -> nn.Module:
        for parameter in model.parameters():
            parameter.mul_(1.1)
        return optimize(model, *arguments)

    monkeypatch.setattr(moefx, "optimize", wrong)
    assert cli.main(["demo", "--steps", "2", "--out", str(tmp_path)]) == 1
    assert "FAILED: final loss" in capsys.readouterr().out
