"""examples/paper: what each experiment writes, that runs are shared and resumed, and its parts."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import run
from torch import nn

PICTURES = {
    "figure4": ["figure4.png"],
    "figure5": ["figure5.png"],
    "figure6": ["figure6.png", "figure8.png"],
    "figure9": ["figure9.png", "figure10.png", "figure11.png"],
}
# How many runs each reads.
RUNS = {"table1": 6, "table2": 0, "table3": 6, "table4": 4, "oracle": 2} | {
    "figure4": 8, "figure5": 2, "figure6": 4, "figure9": 1
}  # fmt: skip


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of the first table of a Markdown text, without its rule."""
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in tables[0].splitlines()]
    return [rows[0], *rows[2:]]


def run_times(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*")}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every experiment once, in one results folder."""
    out = tmp_path_factory.mktemp("paper")
    done = run("paper.py", "all", "--budget", "smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warnings, no advice
    return out / "digits-smoke"


class TestSmoke:
    @pytest.mark.parametrize("name", RUNS)
    def test_every_experiment_writes_its_files(self, smoke: Path, name: str) -> None:
        stored = json.loads((smoke / f"{name}.json").read_text())
        assert stored["settings"]["seeds"] == [0]
        assert stored["settings"]["budget"]["name"] == "smoke"
        assert stored["settings"]["images"] == [320, 100]
        assert stored["versions"]["torch"] == torch.__version__
        assert stored["hardware"]["cores"] == os.cpu_count()
        assert stored["results"]
        for folder, settings in stored["runs"].items():
            assert json.loads((smoke / "runs" / folder / "settings.json").read_text()) == settings
        assert len(stored["runs"]) == RUNS[name]
        text = (smoke / f"{name}.md").read_text()
        rows = rows_of(text)
        assert len({len(row) for row in rows}) == 1
        assert len(rows) > 2
        for picture in PICTURES.get(name, []):
            assert f"]({picture})" in text
            with Image.open(smoke / picture) as image:
                assert min(image.size) > 200
                assert np.asarray(image.convert("L")).std() > 5

    def test_tables_have_the_rows_and_the_papers_numbers(self, smoke: Path) -> None:
        rows = rows_of((smoke / "table1.md").read_text())
        assert rows[0] == ["method"] + [
            cell
            for score in ("LP", "kNN 5", "kNN 200")
            for cell in (f"{score} mean", "best", "paper, CIFAR-10")
        ]
        by_name = {row[0]: row for row in rows[1:]}
        methods = ["untrained", "SimCLR", "MoCo", "MoCo v2", "BYOL", "C2BIN"]
        assert list(by_name)[: len(methods)] == methods
        assert by_name["C2BIN"][3::3] == ["81.5", "84.8", "84.9"]
        assert by_name["C2BIN [best]"][1:] == ["", "", "82.3", "", "", "85.9", "", "", "85.3"]
        results = json.loads((smoke / "table1.json").read_text())["results"]
        assert by_name["MoCo"][1] == f"{100 * results['MoCo'][0]['linear_best']:.1f}"
        assert "| C2BIN   |    200 |   256 |         64.4 |" in (smoke / "table2.md").read_text()
        table3 = (smoke / "table3.md").read_text()
        assert "0.80 / 0.88 / 0.77" in table3  # SCAN: every row of Table 11 is there
        ours = {row[0]: row for row in rows_of(table3)}
        assert ours["C2BIN"][3] == "0.62"
        assert {"K-means on pixels", "SC on pixels", "AC on pixels"} < set(ours)
        trained = ("SimCLR", "BYOL", "IIC", "PICA", "CC", "C2BIN")
        assert {f"k-means on {name}'s features" for name in trained} < set(ours)
        published = {name: ours[name][3::3][:2] for name in ("IIC", "PICA", "CC")}
        assert published == {"IIC": ["-", "0.62"], "PICA": ["0.56", "0.65"], "CC": ["0.70", "0.79"]}
        results = json.loads((smoke / "table3.json").read_text())["results"]
        # Of two heads, the one with as many clusters as classes.
        assert [results[name][0]["k"] for name in published] == [10, 10, 10]
        assert [row[0] for row in rows_of((smoke / "table4.md").read_text())[1:]] == [
            *("no heads", "{32}", "{32, 64, 128}", "{32, 64, 128}, averaged")
        ]
        for name in ("figure4", "figure6"):
            shown = {row[0] for row in rows_of((smoke / f"{name}.md").read_text())[1:]}
            assert shown == {"SimCLR", "BYOL", "PICA", "C2BIN"}

    def test_runs_are_shared_between_experiments(self, smoke: Path) -> None:
        # Table 1's six, six of Table 10, PICA, four at rate 2, two more rows of heads, the oracle.
        assert len(list(smoke.glob("runs/*/result.json"))) == 6 + 6 + 1 + 4 + 2 + 1
        assert len(list(smoke.glob("runs/*"))) == 20

    def test_a_second_call_trains_nothing_and_says_the_same(self, smoke: Path) -> None:
        before, table = run_times(smoke), (smoke / "table4.md").read_bytes()
        done = run("paper.py", "table4", "--budget", "smoke", "--out", smoke.parent)
        assert done.returncode == 0, done.stderr
        assert "4 of 4 runs are there already" in done.stdout
        assert run_times(smoke) == before
        assert (smoke / "table4.md").read_bytes() == table

    def test_a_table_of_other_settings_is_not_replaced(self, smoke: Path, capsys: Any) -> None:
        from experiments.paper.cli import main

        before = (smoke / "oracle.json").read_bytes()
        call = ["oracle", "--budget", "smoke", "--out", str(smoke.parent), "--seeds", "5"]
        assert main(call) == 2
        message = capsys.readouterr().err
        assert "oracle.json was made with other settings (seeds was [0], is [5])" in message
        assert "--overwrite" in message
        assert (smoke / "oracle.json").read_bytes() == before

    def test_snapshots_are_those_of_the_run(self, smoke: Path) -> None:
        (folder,) = smoke.glob("runs/clustering-c2bin-*")
        last, final = np.load(folder / "epoch3.npz"), np.load(folder / "final.npz")
        assert sorted(last) == ["head0", "head1", "head2", "test"]
        for name in last:
            np.testing.assert_allclose(last[name], final[name], atol=1e-5)
        assert not np.allclose(np.load(folder / "epoch1.npz")["test"], final["test"], atol=1e-3)


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["table7"], "invalid choice: 'table7'"),
            (["table1", "--seeds", "0", "0"], "--seeds must be different"),
            (["table1", "--epochs", "0"], "--epochs must be at least 1, got 0"),
            (["table1", "--data", "x", "--dataset", "digits"], "exclude each other"),
            (["table2", "--solo", "nowhere"], "there is no nowhere/main_pretrain.py"),
        ],
    )
    def test_mistakes_are_named(self, arguments: list[str], message: str, capsys: Any) -> None:
        from experiments.paper.cli import parse

        with pytest.raises(SystemExit) as stopped:
            parse(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

    def test_a_missing_folder_is_one_line(self, tmp_path: Path, capsys: Any) -> None:
        from experiments.paper.cli import main

        assert main(["table1", "--data", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
        assert capsys.readouterr().err.endswith("none does not exist\n")

    def test_epochs_move_the_snapshots(self) -> None:
        from experiments.paper.cli import parse

        scale = parse(
            ["figure5", "--budget", "full", "--dataset", "digits", "--epochs", "20"]
        ).scale
        assert (scale.epochs, scale.clustering_epochs, scale.snapshots) == (20, 20, (1, 6, 20))


class TestLongTail:
    @pytest.mark.parametrize(("rate", "classes"), [(1.0, 10), (10.0, 10), (100.0, 10), (50.0, 3)])
    def test_class_sizes_fall_exponentially(self, rate: float, classes: int) -> None:
        from experiments.paper.subsets import long_tailed

        labels = torch.arange(classes).repeat(200)[torch.randperm(200 * classes)]
        kept = long_tailed(labels, rate, seed=3)
        counts = labels[kept].bincount(minlength=classes).tolist()
        for c, count in enumerate(counts):
            exact = 200 * math.exp(-math.log(rate) * c / (classes - 1))
            assert exact - 1 < count <= exact + 1e-6
        assert counts[0] == 200
        assert counts[-1] == round(200 / rate)
        assert kept.unique().numel() == kept.numel()

    def test_is_nested_and_fixed_by_its_seed(self) -> None:
        from experiments.paper.subsets import long_tailed

        labels = torch.arange(10).repeat_interleave(50)
        ten, hundred = (set(long_tailed(labels, rate, 0).tolist()) for rate in (10.0, 100.0))
        assert hundred < ten
        assert ten == set(long_tailed(labels, 10.0, 0).tolist())
        assert ten != set(long_tailed(labels, 10.0, 1).tolist())

    def test_keeps_an_image_of_every_class(self) -> None:
        from experiments.paper.subsets import long_tailed

        labels = torch.arange(10).repeat_interleave(5)
        assert labels[long_tailed(labels, 100.0, 0)].bincount().tolist()[-1] == 1

    def test_a_rate_below_one_is_refused(self) -> None:
        from experiments.paper.subsets import long_tailed
        from experiments.store import ExperimentError

        with pytest.raises(ExperimentError, match=r"at least 1, got 0\.5"):
            long_tailed(torch.tensor([0, 1]), 0.5, 0)


class TestSuperclasses:
    # The coarse label of each of the 100 fine labels, as the data set's own files pair them.
    COARSE = (
        "4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 "
        "9 11 5 5 19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 "
        "0 1 16 12 9 13 15 13 16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13"
    )

    def test_are_the_published_ones(self) -> None:
        from experiments.paper.subsets import SUPERCLASSES, superclasses

        fine = sorted(name for names in SUPERCLASSES.values() for name in names.split())
        assert len(fine) == len(set(fine)) == 100
        assert superclasses(fine).tolist() == [int(label) for label in self.COARSE.split()]

    def test_replace_the_labels(self) -> None:
        from experiments.data import Images
        from experiments.paper.subsets import SUPERCLASSES, with_superclasses

        fine = sorted(name for names in SUPERCLASSES.values() for name in names.split())
        pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
        labels = torch.tensor([fine.index("beaver"), fine.index("tractor")])
        images = with_superclasses(Images(pixels, labels, pixels, labels.flip(0), fine, "x"))
        assert images.train_labels.tolist() == [0, 19]
        assert images.test_labels.tolist() == [19, 0]
        assert images.classes[19] == "vehicles_2"

    def test_are_for_clusters_alone(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from experiments.data import Images
        from experiments.paper import clusters, runs
        from experiments.paper.cli import parse
        from experiments.paper.subsets import SUPERCLASSES

        fine = sorted(name for names in SUPERCLASSES.values() for name in names.split())
        pixels = torch.zeros(200, 3, 4, 4, dtype=torch.uint8)
        labels = torch.arange(200) % 100
        monkeypatch.setattr(
            runs, "load", lambda *_: Images(pixels, labels, pixels, labels, fine, "cifar100")
        )
        args = parse(["table3", "--dataset", "cifar100", "--out", str(tmp_path)])
        lab = runs.Lab(args, args.scale)
        heads = {n: s.clusters for n, s in clusters.specs(lab, "c2bin", "pica", "cc").items()}
        assert heads == {"c2bin": (20, 40, 160), "pica": (20, 140), "cc": (20,)}
        assert lab.spec("pica").clusters == (100, 700)
        assert len(lab.images().classes) == 100
        assert lab.images(clustering=True).train_labels.unique().tolist() == list(range(20))

    def test_other_classes_are_refused(self) -> None:
        from experiments.paper.subsets import superclasses
        from experiments.store import ExperimentError

        with pytest.raises(ExperimentError, match="CIFAR-100's 100 classes, got 2"):
            superclasses(["cat", "dog"])


def test_averaged_heads_weigh_as_much_as_one(tmp_path: Path) -> None:
    from experiments.paper.cli import parse
    from experiments.paper.runs import Lab, Spec

    args = parse(["table4", "--budget", "smoke", "--out", str(tmp_path)])
    lab, spec = Lab(args, args.scale), Spec("c2bin", (8, 16, 32))
    summed, averaged = lab.job(spec, 0), lab.job(replace(spec, averaged=True), 0)
    assert summed.settings["loss"]["cluster_weight"] == 2
    assert averaged.settings["loss"]["cluster_weight"] == pytest.approx(2 / 3)
    assert summed.name != averaged.name
    assert averaged.label == "C2BIN {8, 16, 32}, averaged"


class TestOracle:
    def test_is_the_loop(self) -> None:
        from experiments.methods import contrast_across_classes

        generator = torch.Generator().manual_seed(0)
        z0, z1 = torch.randn(2, 7, 5, generator=generator)
        labels = torch.tensor([0, 1, 0, 2, 1, 1, 3])
        views = torch.cat([z0, z1]).double().tolist()
        classes = labels.tolist() * 2

        def cosine(a: list[float], b: list[float]) -> float:
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

        total = 0.0
        for i in range(14):
            partner = (i + 7) % 14
            pull = math.exp(cosine(views[i], views[partner]) / 0.3)
            push = sum(
                math.exp(cosine(views[i], views[j]) / 0.3)
                for j in range(14)
                if classes[j] != classes[i]
            )
            total -= math.log(pull / (pull + push)) / 14
        ours = contrast_across_classes(z0, z1, labels, 0.3)
        assert ours.item() == pytest.approx(total, rel=1e-5)

    def test_with_all_classes_apart_it_is_simclr(self) -> None:
        from experiments.methods import contrast_across_classes
        from lightly.loss import NTXentLoss

        z0, z1 = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(1))
        ours = contrast_across_classes(z0, z1, torch.arange(9), 0.5)
        torch.testing.assert_close(ours, NTXentLoss(temperature=0.5)(z0, z1))

    def test_the_method_reads_the_labels(self) -> None:
        from experiments.methods import OracleSimCLR

        torch.manual_seed(0)
        model = OracleSimCLR(nn.Sequential(nn.Flatten(), nn.Linear(12, 8)), 8, hidden_dim=8)
        logged: dict[str, Any] = {}
        model.log_losses = lambda losses, batch_size: logged.update(losses, n=batch_size)
        views = tuple(torch.rand(2, 6, 3, 2, 2))
        alone = model.training_step((views, torch.zeros(6, dtype=torch.long)), 0)
        apart = model.training_step((views, torch.arange(6)), 0)
        assert alone.item() == pytest.approx(0.0, abs=1e-6)  # nothing to push away
        assert apart.item() > 1
        assert logged["n"] == 6


def test_moco_is_mocov2_with_a_linear_projector() -> None:
    from experiments.methods import MoCo

    model = MoCo(nn.Sequential(nn.Flatten(), nn.Linear(12, 8)), 8, queue_size=64)
    assert isinstance(model.projector, nn.Linear)
    assert model.projector.weight.shape == (128, 8)
    assert torch.equal(model.projector.weight, model.follower_projector.weight)
    assert not any(p.requires_grad for p in model.follower_projector.parameters())
    torch.autograd.backward(model.losses(*torch.rand(2, 6, 3, 2, 2))["loss"])
    assert model.projector.weight.grad is not None


def test_linear_evaluation_trains_each_rate_alone() -> None:
    from experiments.evaluation import Features
    from experiments.paper.probe import linear_evaluation
    from lightly.utils.lars import LARS

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 6, generator=generator)
    labels = torch.arange(4).repeat(40)
    train, test = (
        Features(centres[labels] + torch.randn(160, 6, generator=generator), labels)
        for _ in range(2)
    )
    rates = (0.5, 5.0, 50.0)
    together = linear_evaluation(train, test, epochs=12, rates=rates, batch_size=50, seed=3)
    for rate, ours in zip(rates, together, strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            classifier = nn.Linear(6, 4)
        optimizer = LARS(
            [
                {"params": [classifier.weight], "weight_decay": 1e-6},
                {"params": [classifier.bias], "weight_decay": 0.0},
            ],
            lr=rate,
            momentum=0.9,
        )
        order = torch.Generator().manual_seed(3)
        for _ in range(12):
            for batch in torch.randperm(160, generator=order).split(50):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(classifier(train.features[batch]), labels[batch])
                torch.autograd.backward(loss)
                optimizer.step()
        right = classifier(test.features).argmax(dim=1) == labels
        assert ours == pytest.approx(float(right.float().mean()), abs=0.01)
    assert len(set(together)) > 1


def test_stored_views_are_the_views(tmp_path: Path) -> None:
    from experiments.data import digits
    from experiments.views import StoredViews, Views

    images = digits(16)
    images = replace(images, train=images.train[:5], train_labels=images.train_labels[:5])
    views = Views(images, "digits", 7)
    stored = StoredViews(tmp_path / "views.npy", views, 2)
    assert len(stored) == 5
    for key in ((0, 0), (1, 4)):
        (a0, a1), label = views[key]
        (b0, b1), same = stored[key]
        assert label == same
        # Eight bits a channel are all that the transforms' images have.
        torch.testing.assert_close(b0, a0, atol=1e-5, rtol=0)
        torch.testing.assert_close(b1, a1, atol=1e-5, rtol=0)
    written = (tmp_path / "views.npy").stat().st_mtime_ns
    StoredViews(tmp_path / "views.npy", views, 2)
    assert (tmp_path / "views.npy").stat().st_mtime_ns == written


def test_pixel_clusters_find_what_is_plain() -> None:
    from experiments.paper.clusters import pixel_clusters

    shades = torch.tensor([0, 120, 250]).repeat(20)
    noise = torch.randint(0, 5, (60, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    images = (shades[:, None, None, None] + noise).to(torch.uint8)
    for name, found in pixel_clusters(images, 3, 0).items():
        groups = {tuple(sorted(found[shades == s].unique().tolist())) for s in (0, 120, 250)}
        assert len(groups) == 3, name
        assert all(len(group) == 1 for group in groups), name


class TestReport:
    @staticmethod
    def result(linear: float) -> dict[str, float]:
        return {"linear_best": linear, "knn5": linear - 0.1, "knn200": linear - 0.2}

    def test_a_row_has_mean_best_and_the_papers_number(self) -> None:
        from experiments.paper.published import Accuracy
        from experiments.paper.report import accuracy_table

        rows = {"BYOL": [self.result(0.5), self.result(0.7)]}
        papers = {"BYOL": Accuracy(80.8, None, 79.7), "DC": Accuracy(None, None, 67.6)}
        table = rows_of(accuracy_table(rows, papers, "stl10"))
        assert table[0][1:4] == ["LP mean", "best", "paper, STL-10"]
        assert table[1] == [
            *("BYOL", "60.0 ± 14.1", "70.0", "80.8", "50.0 ± 14.1", "60.0", "-"),
            *("40.0 ± 14.1", "50.0", "79.7"),
        ]
        assert table[2] == ["DC", "", "", "-", "", "", "-", "", "", "67.6"]

    def test_ranking_says_where_c2bin_loses(self) -> None:
        from experiments.paper.report import ranking

        rows = {"BYOL": [self.result(0.5)], "C2BIN": [self.result(0.4)]}
        assert ranking(rows).startswith("LP: C2BIN is 2 of 2, 10.0 points behind BYOL; kNN 5:")
        rows["C2BIN"] = [self.result(0.7)]
        assert ranking(rows).startswith("LP: C2BIN is 1 of 2, 20.0 points ahead of BYOL")


def test_published_numbers_agree_with_each_other() -> None:
    """The paper repeats some of its numbers; a slip of the pen would break that."""
    from experiments.paper.published import TABLE1, TABLE2, TABLE4, TABLE9, TABLE11

    assert TABLE4[()] == TABLE1["BYOL"]["stl10"]
    assert TABLE4[32, 64, 128] == TABLE1["C2BIN [best]"]["stl10"]
    for table in (TABLE1, TABLE11):
        for name, mean in table["C2BIN [mean]"].items():
            best = table["C2BIN [best]"][name]
            assert all(m <= b for m, b in zip(mean, best, strict=True))
    # Table 9 prints its differences to the first row.
    gaps = {
        (8,): -8.72, (16,): -4.94, (8, 8, 8): -7.92, (16, 16, 16): -3.92,
        (512, 512, 512): -3.5, (8, 16, 32): -0.5, (16, 32, 64): -0.09,
    }  # fmt: skip
    for heads, gap in gaps.items():
        assert TABLE9[heads] - TABLE4[32, 64, 128].linear == pytest.approx(gap, abs=0.005)
    assert len(TABLE11) == 21
    assert len(TABLE2) == 9
    # The abstract of Table 2: a tenth of a point over BYOL, 3.1 behind MoCo v2 at 200 epochs.
    top1 = {name: accuracy for name, epochs, _, accuracy in TABLE2 if epochs == 200}
    assert top1["C2BIN"] - top1["BYOL"] == pytest.approx(0.1)
