"""The studies: halving keeps the best, choices are made on images of their own, runs are kept."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from c2bin_ext import C2BINLoss

SMALL = ["--limit", "60", "--limit-test", "40", "--batch-size", "20", "--workers", "0"]


def assignments(n: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        [torch.randn(n, k, generator=generator).softmax(dim=1) for k in (3, 5)] for _ in range(2)
    )
    return first, second


def test_halving_keeps_the_best_of_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments import study

    asked: list[tuple[int, list[Any], bool]] = []

    class Bench:
        def results(
            self, what: str, trials: list[Any], epochs: int, seeds: list[int], final: bool
        ) -> list[list[dict[str, float]]]:
            asked.append((epochs, list(trials), final))
            # A setting's score is its learning rate, so that the best can be told.
            return [[{"knn200": trial.options.get("lr", 0.06)}] for trial in trials]

    methods = ["simclr", "c2bin"]
    history = study.tune(Bench(), methods, 9, [1, 2, 4])
    assert [epochs for epochs, _, _ in asked] == [1, 2, 4]
    assert [len(trials) for _, trials, _ in asked] == [18, 6, 2]
    assert not any(final for _, _, final in asked)
    first = asked[0][1]
    for method in methods:
        rates = sorted(t.options.get("lr", 0.06) for t in first if t.method == method)
        kept = [t.options.get("lr", 0.06) for t in asked[1][1] if t.method == method]
        assert sorted(kept) == rates[-3:]
        best, score = history[-1]["ranked"][method][0]
        assert score == rates[-1] == best.options.get("lr", 0.06)


def test_settings_are_drawn_alike_and_differ() -> None:
    from experiments import study

    for method in study.METHODS:
        trials = study.draw(method, 8)
        assert trials == study.draw(method, 8)
        assert trials == study.draw(method, 20)[:8]
        assert trials[0] == study.Trial(method)
        assert all(trials.count(trial) == 1 for trial in trials)
        assert all(bool(trial.loss) == (method == "c2bin") for trial in trials[1:])


def test_more_settings_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from experiments import study

    assert len(study.draw("simclr", 61)) == 61
    command = [*SMALL, "--methods", "simclr", "--trials", "62", "--validation", "30"]
    with pytest.raises(SystemExit):
        study.main([*command, "--out", str(tmp_path)])
    assert "--trials 62: SimCLR has no more than 61 settings" in capsys.readouterr().err


def test_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from experiments import study

    command = [*SMALL, "--methods", "byol", "c2bin", "--trials", "2", "--rungs", "1"]
    command += ["--epochs", "1", "--validation", "30", "--seeds", "4", "5", "--out", str(tmp_path)]
    assert study.main(command) == 0
    record = json.loads((tmp_path / "study.json").read_text())
    assert record["settings"]["images"] == {"train": 60, "test": 40, "validation": 30}
    assert [len(rung["validation_knn200"]) for rung in record["rungs"]] == [4]
    rows = [row["row"] for row in record["final"]]
    assert rows == [
        "BYOL, tuned",
        "BYOL, as in the demo",
        "C2BIN, tuned",
        "C2BIN, as in the demo",
    ]
    assert set(record["final"][0]["results"]) == {"4", "5"}
    text = (tmp_path / "study.md").read_text()
    assert all(row in text for row in rows)

    # What is there is not trained again, and gives the same table.
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/result.json")}
    assert study.main(command) == 0
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/result.json")}
    assert (tmp_path / "study.md").read_text() == text
    assert not list(tmp_path.glob("runs/*/last.ckpt"))


def test_choices_are_made_on_images_of_their_own(tmp_path: Path) -> None:
    from experiments import study
    from experiments.runs import Bench, parse_study, study_parser

    parser = study_parser(study.__doc__, str(tmp_path))
    args = parse_study(parser, SMALL)
    args.validation = 30
    bench = Bench(args, longest=1)
    parts = [bench.images.train, bench.validation.test, bench.images.test]
    assert [len(part) for part in parts] == [60, 30, 40]
    seen = [{image.numpy().tobytes() for image in part} for part in parts]
    assert not seen[0] & seen[1]
    assert not seen[1] & seen[2]
    assert torch.equal(bench.validation.train, bench.images.train)
    # Every class is there to choose by.
    assert len(bench.validation.test_labels.unique()) == 10


@pytest.mark.parametrize(
    ("table", "names"),
    [
        (
            "decisions",
            [
                "default",
                "against the runner",
                "cluster weight warmed up",
                "features as they are",
                "features standardised",
                "as printed",
            ],
        ),
        (
            "many_clusters",
            ["the paper's weights", "statistics over 10 steps", "queue of 512 images"],
        ),
        ("printed", ["as printed", "entropy weight 1/n", "entropy weight 1/n, cosine"]),
    ],
)
def test_decisions(table: str, names: list[str], tmp_path: Path) -> None:
    from experiments import decisions

    command = [table, *SMALL, "--epochs", "1", "--seeds", "0", "--num-clusters", "4", "8"]
    assert decisions.main([*command, "--out", str(tmp_path), "--only", *names]) == 0
    record = json.loads((tmp_path / f"{table}.json").read_text())
    rows = [choice["row"] for choice in record["choices"]]
    assert rows == ["BYOL, no cluster terms", *names]
    found = {choice["row"]: choice["results"]["0"] for choice in record["choices"]}
    curves = [json.loads(path.read_text())["curve"] for path in tmp_path.glob("runs/*/result.json")]
    # Every choice is another objective: none is an option that nothing reads.
    assert len({curve[0]["train_loss"] for curve in curves}) == len(rows)
    assert [head["k"] for head in found[names[0]]["clustering"][1:]] == [4, 8]


class Plain(torch.nn.Module):
    """A network that remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images)
        return images.mean(dim=(2, 3)) * self.weight


def test_a_pretrained_network_sees_images_as_it_was_trained_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from experiments import methods

    plain = Plain()
    own = methods.networks.Network(plain, (0.5, 0.25, 0.0), (0.5, 0.5, 0.25), "")
    monkeypatch.setattr(methods.networks, "load", lambda name, size: own)
    net, features = methods.pretrained("any", 16)
    assert (features, net.training) == (3, True)
    net(torch.full((1, 3, 2, 2), 0.0))  # the middle of [-1, 1], 0.5 of [0, 1]
    assert plain.seen[-1][0, :, 0, 0].tolist() == pytest.approx([0.0, 0.5, 2.0])


def test_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments import decisions, methods

    monkeypatch.setattr(
        methods.networks,
        "load",
        lambda name, size: methods.networks.Network(Plain(), (0.5,) * 3, (0.5,) * 3, ""),
    )
    rows = ["frozen", "SimCLR, learning rate 0.006", "C2BIN, learning rate 0.006"]
    command = ["finetune", *SMALL, "--epochs", "1", "--seeds", "0", "--num-clusters", "4", "8"]
    command += ["--backbone", "timm:plain", "--out", str(tmp_path), "--only", *rows]
    assert decisions.main(command) == 0
    record = json.loads((tmp_path / "finetune.json").read_text())
    assert [choice["row"] for choice in record["choices"]] == rows
    assert [choice["options"].get("lr") for choice in record["choices"]] == [None, 0.006, 0.006]
    assert record["settings"]["backbone"] == "timm:plain"


def test_unknown_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from experiments import decisions

    with pytest.raises(SystemExit):
        decisions.main([*SMALL, "--backbone", "resnet", "--out", str(tmp_path)])
    assert "expected small, resnet18, resnet34, resnet50 or, pretrained," in capsys.readouterr().err


def test_cells_are_means_over_seeds_and_heads() -> None:
    from experiments.report import HEAD, cells

    def scores(k: int, nmi: float, acc: float, used: int) -> dict[str, float]:
        return {"k": k, "nmi": nmi, "acc": acc, "clusters_in_use": used}

    clusterings = [
        [scores(10, 0.1, 0.2, 10), scores(4, 0.3, 0.5, 4), scores(8, 0.5, 0.3, 6)],
        [scores(10, 0.3, 0.4, 10), scores(4, 0.5, 0.7, 4), scores(8, 0.9, 0.3, 8)],
    ]
    results = [
        {"knn200": 0.25, "knn5": 0.5, "linear": 0.75, "clustering": clustering}
        for clustering in clusterings
    ]
    row = dict(zip(HEAD, cells(results), strict=True))
    assert row["kNN k=200"] == "25.0 ± 0.0"
    # Means 0.1 and 0.3, with heads 0.4 and 0.7; the spread of a and b is |a - b| / √2.
    assert (row["k-means NMI"], row["k-means ACC"]) == ("0.200 ± 0.141", "0.300 ± 0.141")
    assert (row["heads' NMI"], row["heads' ACC"]) == ("0.550 ± 0.212", "0.450 ± 0.071")
    assert row["clusters in use"] == "4 of 4, 7 of 8"
    plain = [{**result, "clustering": result["clustering"][:1]} for result in results]
    assert [len(cells(plain)), *cells(plain)[-3:]] == [len(HEAD), "", "", ""]


def test_baselines_and_curves(tmp_path: Path) -> None:
    from experiments import decisions

    command = ["decisions", *SMALL, "--epochs", "2", "--seeds", "0", "--num-clusters", "4", "8"]
    command += ["--only", "default", "--baselines", "mocov2", "byol", "--out", str(tmp_path)]
    assert decisions.main([*command, "--curves", "--name", "methods"]) == 0
    rows = [
        choice["row"] for choice in json.loads((tmp_path / "methods.json").read_text())["choices"]
    ]
    assert rows == ["MoCo v2", "BYOL, no cluster terms", "default"]
    with Image.open(tmp_path / "methods.png") as picture:
        assert min(picture.size) > 300
    curves = [json.loads(path.read_text())["curve"] for path in tmp_path.glob("runs/*/result.json")]
    assert [[0 <= row["knn"] <= 1 for row in curve] for curve in curves] == [[True] * 2] * 3
    # Without curves nothing is scored on the way, and these are not runs of the others' kind.
    assert decisions.main([*command, "--name", "plain"]) == 0
    assert not (tmp_path / "plain.png").exists()
    assert len(list(tmp_path.glob("runs/*"))) == 6


def test_rows_of_another_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from experiments import decisions

    with pytest.raises(SystemExit):
        decisions.main(["together", *SMALL, "--only", "dot", "--out", str(tmp_path)])
    message = capsys.readouterr().err
    assert "--only: expected rows of together (runner, temperature 0.5, weight 2.0; " in message
    assert "got ['dot']" in message


def test_new_defaults_are_other_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments import demo, study
    from experiments.runs import Bench, Trial, parse_study, study_parser

    args = parse_study(study_parser(study.__doc__, str(tmp_path)), SMALL)
    bench = Bench(args, longest=1)

    def both() -> list[Any]:
        (job,) = bench.jobs(Trial("c2bin"), 1, [0])
        return [job.settings, demo.settings_of(demo.parse(["--out", str(tmp_path)]), bench)]

    before = both()
    assert before == both()
    assert before[0]["options"]["against"] == "follower"
    monkeypatch.setattr(C2BINLoss, "extra_repr", lambda self: "temperature=0.2")
    assert all(old != new for old, new in zip(before, both(), strict=True))


def test_every_choice_is_an_option() -> None:
    from experiments import decisions
    from experiments.methods import model_of

    for choice in (choice for table in decisions.TABLES.values() for choice in table.values()):
        trial = decisions.trial(choice, [4, 8])
        options = {"lr": 0.1, **trial.options}
        settings = {"seed": 0, "backbone": "small", "image_size": 16, "channels_last": False}
        settings |= {"method": trial.method, "options": options, "loss": trial.loss}
        model = model_of(settings)
        assert sum(p.numel() for p in model.parameters()) > 0


@pytest.mark.parametrize("size", [3, 8, 10])
def test_queue(size: int) -> None:
    from experiments.methods import AssignmentQueue, Queued

    loss = Queued(C2BINLoss(), AssignmentQueue(size, (3, 5)))
    whole = C2BINLoss()
    embeddings = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    past: list[list[list[Tensor]]] = [[[], []], [[], []]]  # per view and head, newest last
    for step in range(6):
        heads = assignments(4, seed=step)
        leaves = [[head.clone().requires_grad_() for head in view] for view in heads]
        found = loss(tuple(embeddings), tuple(embeddings), leaves)
        kept = min(size, 4 * step)
        union = [
            [
                torch.cat([leaf, torch.cat([*rows, leaf[:0]])[-kept:] if kept else leaf[:0]])
                for leaf, rows in zip(view, past_view, strict=True)
            ]
            for view, past_view in zip(leaves, past, strict=True)
        ]
        fill = torch.ones(2, 4 + kept, 6)
        wanted = whole(tuple(fill), tuple(fill), union)
        torch.testing.assert_close(found.contrast, wanted.contrast)
        torch.testing.assert_close(found.entropy, wanted.entropy)
        torch.testing.assert_close(
            found.loss,
            found.alignment + whole.cluster_weight * (found.contrast + found.entropy),
        )
        grads = [
            torch.autograd.grad(part.contrast + part.entropy, leaves[0] + leaves[1])
            for part in (found, wanted)
        ]
        torch.testing.assert_close(*grads)
        for view, past_view in zip(heads, past, strict=True):
            for head, rows in zip(view, past_view, strict=True):
                rows.append(head)


def test_gradient_sizes(tmp_path: Path) -> None:
    from experiments import gradients

    command = [*SMALL, "--epochs", "2", "--out", str(tmp_path)]
    assert gradients.main(command) == 0
    record = json.loads((tmp_path / "gradients.json").read_text())
    assert list(record["forms"]) == list(gradients.FORMS)
    assert (tmp_path / "gradients.png").stat().st_size > 10_000
    # The summed entropy pulls n times as hard as the mean in the first step, from which on all
    # forms are the same network.
    first = {name: form["rows"][0] for name, form in record["forms"].items()}
    for k in (32, 64, 128):
        ratio = first["entropy summed"][f"entropy, K={k}"] / first["cosines"][f"entropy, K={k}"]
        assert ratio == pytest.approx(20, rel=1e-3)
    assert first["cosines"]["alignment"] == pytest.approx(first["dot products"]["alignment"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--trials", "0"], "--trials must be at least 1, got 0"),
        (["--rungs", "3", "0"], "--rungs must be at least 1, got 0"),
        (["--rungs", "3", "1"], "--rungs: expected epochs that rise from rung to rung, got [3, 1]"),
        (["--rungs", "3", "3"], "--rungs: expected epochs that rise from rung to rung, got [3, 3]"),
        (["--seeds", "1", "1"], "--seeds must be different whole numbers"),
        (["--processes", "0"], "--processes must be at least 1, got 0"),
    ],
)
def test_mistakes(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from experiments import study

    with pytest.raises(SystemExit):
        study.main(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        (
            "study",
            ["--validation", "100000"],
            "1438 training images, 0 beside --validation 100000, are fewer than one batch of 20",
        ),
        ("study", ["--validation", "9"], "--validation 9: expected at least 10, one a class"),
        ("decisions", ["--batch-size", "61"], "60 training images are fewer than one batch of 61"),
        ("gradients", ["--batch-size", "61"], "60 training images are fewer than one batch of 61"),
        ("decisions", ["--limit-test", "9"], "9 test images are fewer than 10 classes"),
    ],
)
def test_arguments_are_checked_against_the_images_before_work_starts(
    script: str, argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = importlib.import_module(f"experiments.{script}")
    assert command.main([*SMALL, "--out", str(tmp_path / "out"), *argv]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/runs/*"))


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from experiments import study

    missing = tmp_path / "missing"
    assert study.main(["--data", str(missing), "--out", str(tmp_path / "out")]) == 2
    assert f"{missing} does not exist" in capsys.readouterr().err
