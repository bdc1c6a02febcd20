"""known: what one process found in a graph the next one takes, and nothing that could mean something else by then."""

from __future__ import annotations

import copy
import operator
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_backend as tests
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moefx
from moefx import backend, graph_analysis, known
from moefx.errors import Decline
from moefx.report import GRAPHS


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A cache of this test's own, and no graphs of others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MOEFX_NO_CACHE", "0")
    forget()
    yield
    forget()


def forget() -> None:
    """As a new process would."""
    torch._dynamo.reset()
    assert not graph_analysis.KNOWN
    GRAPHS.clear()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="moefx", options=tests.INNER, fullgraph=True, dynamic=True)


def right(model: nn.Module) -> None:
    """Outputs and gradients of the compiled model are those of the model."""
    reference, call = copy.deepcopy(model), compiled(model)
    for shape in ((3, 11), (2, 7)):
        x = tests.tokens(*shape)
        tests.assert_same(tests.outcome(call, model, x), tests.outcome(reference, reference, x), torch.float32)


class Checkpointed(nn.Module):
    """Its block is in a graph that the graph calls."""

    def __init__(self) -> None:
        super().__init__()
        self.block = tests.DenseBmm()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.block, x, use_reentrant=False)
        return y


@pytest.mark.parametrize("kind", [tests.DenseBmm, Checkpointed])
def test_a_graph_of_known_parts_does_not_run_while_it_is_compiled(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def observe(*args: Any) -> Any:
        runs.append(len(args[2]))
        return graph_analysis.observe(*args)

    monkeypatch.setattr(backend, "observe", observe)
    torch.manual_seed(0)
    right(kind())
    first = len(runs)
    assert first
    forget()
    right(kind())
    assert GRAPHS[-1].found and len(runs) == first, "what is known needs no values"
    right(tests.Einsum())
    assert len(runs) > first


@pytest.fixture
def no_analysis(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that were analysed all the same; they are declined."""
    analysed: list[str] = []

    def decline(gm: Any, part: Any, *_: Any) -> Decline:
        analysed.append(part.name)
        return Decline("this test wants no analysis")

    monkeypatch.setattr(backend, "_analyse", decline)
    return analysed


def first_process(model: nn.Module) -> None:
    right(model)
    assert GRAPHS[-1].found and not GRAPHS[-1].found[0].same_as and GRAPHS[-1].analysed == 1
    forget()


@pytest.mark.parametrize("kind", [tests.DenseBmm, tests.Einsum, tests.Gathered])
def test_the_next_process_analyses_nothing(kind: Any, request: pytest.FixtureRequest) -> None:
    first_process(kind())
    analysed, model = request.getfixturevalue("no_analysis"), kind()  # of other weights
    right(model)
    assert not analysed and not GRAPHS[-1].analysed
    (found,) = GRAPHS[-1].found
    assert found.same_as == "an earlier process" and found.errors
    assert "an earlier process" in str(moefx.explain(model))
    with torch.no_grad():
        compiled(model)(tests.tokens(3, 11))
    assert [f.same_as for f in GRAPHS[-1].found] == [found.same_as], "a later graph of this process says so too"


class Wider(tests.DenseBmm):
    """The same text, other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(tests.E, tests.D, 12))
        self.w2 = nn.Parameter(torch.randn(tests.E, 12, tests.D))


class Scaled(tests.DenseBmm):
    """The same sizes, another number."""

    def experts(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return super().experts(tokens, 0.5 * weights, chosen)


@pytest.mark.parametrize("other", [Wider, Scaled])
def test_what_differs_is_analysed(other: Any, request: pytest.FixtureRequest) -> None:
    first_process(tests.DenseBmm())
    analysed = request.getfixturevalue("no_analysis")
    right(other())
    assert analysed and not GRAPHS[-1].found


@pytest.mark.parametrize("how", ["broken", "another key's", "turned off", "torch's caches are turned off", "another version"])
def test_what_cannot_be_taken_is_analysed(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    first_process(tests.DenseBmm())
    files = list((tmp_path / "moefx" / "found").glob("*.pickle"))
    assert files
    if how == "broken":
        for file in files:
            file.write_bytes(file.read_bytes()[:40])
    elif how == "another key's":
        load = known.pickle.loads
        monkeypatch.setattr(known.pickle, "loads", lambda data: ("another", load(data)[1]))
    elif how == "turned off":
        monkeypatch.setenv("MOEFX_NO_CACHE", "1")
    elif how == "another version":
        monkeypatch.setattr(known, "_versions", lambda: "moefx of tomorrow")
    analysed = request.getfixturevalue("no_analysis")
    with torch.compiler.config.patch(force_disable_caches=how.startswith("torch's")):
        right(tests.DenseBmm())
    assert analysed
    assert how != "broken" or not any(file.exists() for file in files)


def test_only_so_many_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "MOST", 1)
    for kind in (tests.DenseBmm, Wider):
        first_process(kind())
    assert len(list((tmp_path / "moefx" / "found").iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "moefx").write_text("a file where the folder should be", encoding="utf-8")
    right(tests.DenseBmm())
    assert GRAPHS[-1].found and "not kept" in caplog.text


def test_what_cannot_be_written_down_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(known, "_kept", lambda found: lambda: found)
    right(tests.DenseBmm())
    assert GRAPHS[-1].found and "not kept" in caplog.text
    assert not list(tmp_path.glob("moefx/found/*"))


def mine(x: Tensor) -> Tensor:
    return x


def test_names_that_may_mean_something_else() -> None:
    """Functions of the user's, lambdas, objects that print their address, operators of packages without a known version."""

    class Thing:
        pass

    library = torch.library.Library("moefx_test_known", "DEF")
    library.define("op(Tensor x) -> Tensor")
    for x in (mine, lambda x: x, Thing(), torch.ops.moefx_test_known.op.default):
        assert known.text_of(("a", 1, (x,))) is None
    stable = (torch.mm, torch.Tensor.add_, operator.mul, torch.ops.aten.mm.default, torch.nn.functional.silu, torch._C._nn.linear)
    texts = [known.text_of((x,)) for x in stable]
    assert None not in texts and len(set(texts)) == len(stable)


def test_another_process(tmp_path: Path) -> None:
    """Keys are the same text there."""
    folder = Path(tests.__file__).parent
    program = f"""
import sys
sys.path[:0] = {[str(folder), str(folder.parent)]}
import test_known, test_backend as tests
from moefx import backend
analysed = []
analyse = backend._analyse
backend._analyse = lambda gm, part, *more: (analysed.append(part.name), analyse(gm, part, *more))[1]
import os
os.environ["MOEFX_NO_CACHE"] = "0"
test_known.right(tests.Einsum())
print(len(analysed))
"""
    counts = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=folder.parent)
        counts.append(int(done.stdout.splitlines()[-1]))
    assert counts[0] > 0 and counts[1] == 0
