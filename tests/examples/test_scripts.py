"""The short scripts run by themselves and say what they promise; launchers only launch."""

from __future__ import annotations

import ast
import re

import pytest
from scripts import EXAMPLES, run, run_here

LAUNCHERS = {
    *("decisions", "demo", "features", "gradient_sizes", "lightly_benchmark", "paper"),
    *("learning_curves", "pipeline_cost", "solo_benchmark", "study"),
}


def imports(path: str) -> set[str]:
    """Return the first parts of the names of all modules that a script imports."""
    tree = ast.parse((EXAMPLES / path).read_text(encoding="utf-8"))
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    froms = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in (*names, *froms)}


@pytest.mark.parametrize("path", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_no_script_imports_another(path: str) -> None:
    ours = {part.stem for part in EXAMPLES.iterdir()} - {"README"}
    if path.removesuffix(".py") in LAUNCHERS:
        assert len((EXAMPLES / path).read_text(encoding="utf-8").splitlines()) <= 10
        ours -= {"experiments", "benchmarks"}
    assert not imports(path) & ours


def test_no_path_is_patched_and_every_script_is_described() -> None:
    for path in EXAMPLES.rglob("*.py"):
        assert "sys.path" not in path.read_text(encoding="utf-8"), path
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"[`{path.name}`]({path.name})" in readme for path in EXAMPLES.glob("*.py"))


def test_adding_clusters_gives_clusters() -> None:
    shown = run_here("add_clusters_to_your_method.py", "--steps", 20)
    without, with_them = (float(x) for x in re.findall(r"10 clusters ([\d.]+)", shown))
    assert with_them > without + 0.1
    text = (EXAMPLES / "add_clusters_to_your_method.py").read_text(encoding="utf-8")
    assert text.count("# added\n") == 3


def test_lightly_module() -> None:
    shown = run_here("lightly_module.py", "--epochs", 2)
    first, second = (float(x) for x in re.findall(r"epoch \d: loss ([\d.]+)", shown))
    assert second < first
    assert re.search(r"nmi of the 10 clusters: 0\.[3-9]", shown)


def off(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"off by ([\d.e+-]+) of its norm", text)]


def test_micro_batches() -> None:
    shown = run_here("micro_batches.py")
    shared, averaged = off(shown)
    assert shared < 1e-4 < 1e-2 < averaged
    whole, parts = re.findall(r"loss ([\d.]+)", shown)
    assert float(whole) == pytest.approx(float(parts), rel=1e-5)


def test_two_ranks() -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    done = run("two_ranks.py", launcher=torchrun)
    assert done.returncode == 0, done.stderr
    gathered, alone = off(done.stdout)
    assert gathered < 1e-4 < 1e-2 < alone
    whole, ours, _ = re.findall(r"loss ([\d.]+)", done.stdout)
    assert float(whole) == pytest.approx(float(ours), rel=1e-5)


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("plain_pytorch.py", ["--steps", 20], ["kNN(5): 0.9", "ACC of the 10-cluster head"]),
        ("check_a_loss.py", [], ["flipped_entropy", "ntxent_of_clusters"]),
        ("cluster_features.py", ["--epochs", 2, "--clusters", 10, 20], ["20 clusters:", "digits:"]),
        (
            "benchmarks/distributed_cost.py",
            ["--rounds", 3, "--processes", 2],
            ["| 2 | gathered assignments |", "| 1024 | 262,144 | 32, 64, 128 |"],
        ),
        (
            "benchmarks/step_cost.py",
            ["--host", "lightly", "--batch-size", 4, "--rounds", 1],
            ["C2BIN", "BYOL"],
        ),
        (
            "pipeline_cost.py",
            ["--batch-size", 4, "--images", 16, "--seconds", 0],
            ["step alone"],
        ),
    ],
)
def test_the_others(script: str, arguments: list[object], words: list[str]) -> None:
    shown = run_here(script, *arguments)
    assert all(word in shown for word in words)
