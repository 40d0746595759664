"""examples/demo.py: what it writes, that it resumes exactly, and what it says of bad folders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ENVIRONMENT, EXAMPLES, run
from scripts import folder as run_folder

DEMO = EXAMPLES / "demo.py"
METHODS = ("simclr", "mocov2", "byol", "c2bin")


def call_demo(*arguments: Any) -> int:
    """Run it in this process, which saves the imports; the mistakes need no training."""
    from experiments import demo

    return demo.main([str(argument) for argument in arguments])


def weights(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


class TestSmoke:
    stdout: str

    @pytest.fixture(scope="class")
    @classmethod
    def out(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        out = tmp_path_factory.mktemp("demo") / "out"
        done = run("demo.py", "--smoke", "--out", out)
        assert done.returncode == 0, done.stderr
        # Not a word besides: no deprecation warnings, no advice.
        assert done.stderr == ""
        assert done.stdout.count("| method") == 1
        cls.stdout = done.stdout
        return out

    def test_writes_every_file(self, out: Path) -> None:
        for name in ("results.json", "results.md", "curves.png", "tsne.png", "clusters.png"):
            assert (out / name).stat().st_size > 500, name
        for name in ("curves.png", "tsne.png", "clusters.png"):
            with Image.open(out / name) as picture:
                assert min(picture.size) > 200
                # Something was drawn on the white.
                assert np.asarray(picture.convert("L")).std() > 5

    def test_table_has_every_method_and_head(self, out: Path) -> None:
        lines = (out / "results.md").read_text().splitlines()
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
        assert len({len(row) for row in rows}) == 1
        head, body = rows[0], rows[2:]
        assert head[:4] == ["method", "linear probe", "kNN k=5", "kNN k=200"]
        assert head[-1] == "s/epoch"
        labels = [row[0] for row in body if row[0]]
        assert labels == ["untrained", "SimCLR", "MoCo v2", "BYOL", "C2BIN"]
        assert [row[4] for row in body if "own head" in row[4]] == [
            f"own head, K={k}" for k in (32, 64, 128)
        ]
        for row in body:
            assert all(0 <= float(cell) <= 1 for cell in row[5:9])
        assert (out / "results.md").read_text().split("\n\n")[0] in self.stdout

    def test_results_carry_settings_versions_and_hardware(self, out: Path) -> None:
        results = json.loads((out / "results.json").read_text())
        assert results["settings"]["epochs"] == 2
        assert results["settings"]["images"] == [320, 100]
        assert results["versions"]["torch"] == torch.__version__
        assert set(results["versions"]) >= {"python", "torchvision", "lightly", "numpy", "sklearn"}
        assert set(results["versions"]) >= {"c2bin_ext"}
        assert results["hardware"]["cores"] == os.cpu_count()
        assert results["seeds"] == [0]
        assert results["corrupt_files"] == 0
        c2bin = results["results"]["c2bin"]["0"]
        assert len(c2bin["curve"]) == 2
        assert c2bin["seconds_per_epoch"] > 0

    def test_every_method_started_from_the_same_backbone(self, out: Path) -> None:
        from experiments import demo
        from experiments.methods import model_of
        from experiments.runs import Bench

        args = demo.parse(["--smoke"])
        jobs = {job.settings["method"]: job for job in demo.jobs_of(args, Bench(args, 2))}
        models = [model_of(jobs[method].settings) for method in METHODS]
        states = [model.backbone.state_dict() for model in models]
        for state in states[1:]:
            for name, tensor in states[0].items():
                assert torch.equal(state[name], tensor)
        trained = weights(run_folder(out, "byol") / "last.ckpt")["state_dict"]["backbone.0.weight"]
        assert not torch.equal(trained, states[0]["0.weight"])

    def test_the_wiring_of_the_paper_reaches_the_model(self) -> None:
        from experiments import demo
        from experiments.methods import model_of
        from experiments.runs import Bench

        papers = ["--against", "runner", "--no-normalize", "--loss", "temperature=0.5"]
        for more, against, normalize, temperature in (
            ([], "follower", True, 0.1),
            (papers, "runner", False, 0.5),
        ):
            args = demo.parse(["--smoke", *more])
            bench = Bench(args, 2)
            model: Any = model_of(demo.jobs_of(args, bench)[-1].settings)
            assert (model.against, model.cluster_head.normalize) == (against, normalize)
            assert model.criterion.loss.temperature == temperature
            settings = demo.settings_of(args, bench)
            assert (settings["against"], settings["normalize"]) == (against, normalize)

    def test_a_second_call_trains_nothing(self, out: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*")}
        table = (out / "results.md").read_text()
        assert call_demo("--smoke", "--out", out) == 0
        assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*")} == before
        assert (out / "results.md").read_text() == table

    def test_other_settings_are_refused(self, out: Path, capsys: Any) -> None:
        before = (out / "results.json").read_bytes()
        assert call_demo("--smoke", "--out", out, "--epochs", 3) == 2
        message = capsys.readouterr().err
        assert "epochs was 2, is 3" in message
        assert "--overwrite" in message
        assert (out / "results.json").read_bytes() == before


TINY = (
    *("--limit", 64, "--limit-test", 30, "--batch-size", 32, "--epochs", 3, "--num-clusters", 4),
    *("--methods", "mocov2", "c2bin"),
)


class TestResume:
    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        out = tmp_path_factory.mktemp("whole") / "out"
        assert call_demo(*TINY, "--out", out) == 0
        return out

    @staticmethod
    def interrupt(out: Path, after: int, how: signal.Signals) -> tuple[int, str]:
        """Run until C2BIN is in the middle of the epoch after so many whole ones; then signal."""
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, str(DEMO), *map(str, TINY), "--out", str(out)],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        middle = out / f"step-in-epoch-{after}"
        deadline = time.monotonic() + 120
        while not middle.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(how)
        _, errors = process.communicate(timeout=60)
        assert middle.exists()
        assert not (run_folder(out, "c2bin") / "result.json").exists()
        assert weights(run_folder(out, "c2bin") / "last.ckpt")["epoch"] == after - 1
        return process.returncode, errors

    def test_interrupted_and_killed_it_ends_as_if_it_had_not_been(
        self, whole: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        code, errors = self.interrupt(out, after=1, how=signal.SIGINT)
        assert code == 130
        assert f"Finished runs are kept in {out}; the same command goes on" in errors
        assert "Traceback" not in errors
        finished = (run_folder(out, "mocov2") / "result.json").read_bytes()

        code, _ = self.interrupt(out, after=2, how=signal.SIGKILL)
        assert code == -signal.SIGKILL

        done = run("demo.py", *TINY, "--out", out)
        assert done.returncode == 0, done.stderr
        assert "C2BIN, seed 0: going on after epoch 2 of 3" in done.stdout
        assert (run_folder(out, "mocov2") / "result.json").read_bytes() == finished
        for method in ("mocov2", "c2bin"):
            ours, theirs = (weights(run_folder(o, method) / "last.ckpt") for o in (out, whole))
            assert ours["epoch"] == theirs["epoch"] == 2
            for name, tensor in theirs["state_dict"].items():
                assert torch.equal(ours["state_dict"][name], tensor), name
        results = [
            json.loads((o / "results.json").read_text())["results"]["c2bin"]["0"]
            for o in (out, whole)
        ]
        for key in ("linear", "knn5", "clustering"):
            assert results[0][key] == results[1][key]
        assert [row["epoch"] for row in results[0]["curve"]] == [1, 2, 3]

    def test_the_follower_and_the_queue_are_in_the_checkpoint(self, whole: Path) -> None:
        names = weights(run_folder(whole, "mocov2") / "last.ckpt")["state_dict"].keys()
        assert {"criterion.memory_bank.bank", "criterion.memory_bank.bank_ptr"} <= names
        assert any(name.startswith("follower_backbone") for name in names)

    def test_the_number_of_workers_changes_nothing(self, whole: Path, tmp_path: Path) -> None:
        command = (*TINY[:-2], "c2bin", "--workers", 0, "--out", tmp_path / "out")
        assert call_demo(*command) == 0
        ours, theirs = (
            weights(run_folder(o, "c2bin") / "last.ckpt")["state_dict"]
            for o in (tmp_path / "out", whole)
        )
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name


# The script, with a pause after the first step of every epoch but the first.
SLOW = """
import pathlib, runpy, sys, time
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rsplit("/", 1)[0])
from experiments import training
step = training.Progress.on_train_batch_end
def slow(self, trainer, pl_module, outputs, batch, batch_idx):
    step(self, trainer, pl_module, outputs, batch, batch_idx)
    if self.label == "C2BIN" and trainer.current_epoch and batch_idx == 0:
        (pathlib.Path(sys.argv[-1]) / f"step-in-epoch-{trainer.current_epoch}").touch()
        time.sleep(5)
training.Progress.on_train_batch_end = slow
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes_make_one_result(tmp_path: Path) -> None:
    tiny = (*TINY[:-2], "c2bin", "--devices", 2, "--accelerator", "cpu")
    done = run("demo.py", *tiny, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| method") == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert len(results["c2bin"]["0"]["curve"]) == 3


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of pictures: `folder("train/cat", 3)` adds three."""
    draw = np.random.default_rng(0)

    def make(name: str, count: int, mode: str = "RGB") -> Path:
        place = tmp_path / "images" / name
        place.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = draw.integers(0, 256, (20, 26, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(place / f"{i}.tif")
        return tmp_path / "images"

    return make


class TestFolders:
    def complaint(self, capsys: Any, tmp_path: Path, *arguments: Any) -> str:
        """Return the one line a refused call prints."""
        out = tmp_path / "out"
        assert call_demo("--smoke", "--out", out, *arguments) == 2
        printed = capsys.readouterr()
        assert not list(out.glob("runs/*"))
        lines = printed.err.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("demo.py: error: ")
        return lines[0]

    def test_missing(self, capsys: Any, tmp_path: Path) -> None:
        message = self.complaint(capsys, tmp_path, "--data", tmp_path / "nowhere")
        assert "nowhere does not exist" in message

    def test_a_file(self, capsys: Any, tmp_path: Path) -> None:
        (tmp_path / "photo.jpg").write_bytes(b"x")
        assert "is a file" in self.complaint(capsys, tmp_path, "--data", tmp_path / "photo.jpg")

    def test_empty(self, capsys: Any, tmp_path: Path) -> None:
        (tmp_path / "images").mkdir()
        message = self.complaint(capsys, tmp_path, "--data", tmp_path / "images")
        assert "no class folders" in message

    def test_unreadable(self, capsys: Any, tmp_path: Path, folder: Any, monkeypatch: Any) -> None:
        root = folder("cat", 3)

        def refuse(self: Path) -> Any:
            raise PermissionError(13, "Permission denied", str(self))

        # Not by chmod, which does not stop root.
        monkeypatch.setattr(Path, "iterdir", refuse)
        message = self.complaint(capsys, tmp_path, "--data", root)
        assert f"cannot read {root}: permission denied" in message

    def test_unreadable_class(
        self, capsys: Any, tmp_path: Path, folder: Any, monkeypatch: Any
    ) -> None:
        folder("cat", 3)
        root = folder("dog", 3)
        scandir = os.scandir

        def refuse(path: Any) -> Any:
            if Path(path) == root / "dog":
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        message = self.complaint(capsys, tmp_path, "--data", root)
        assert f"cannot read {root / 'dog'}: permission denied" in message

    @pytest.mark.parametrize("place", ["cat", "train/cat", "test/cat"])
    def test_a_class_with_a_single_image(
        self, place: str, capsys: Any, tmp_path: Path, folder: Any
    ) -> None:
        for name in (
            ("train/cat", "train/dog", "test/cat", "test/dog") if "/" in place else ("dog",)
        ):
            if name != place:
                folder(name, 3)
        message = self.complaint(capsys, tmp_path, "--data", folder(place, 1))
        assert f"{place} has a single image (0.tif)" in message

    def test_a_class_without_images(self, capsys: Any, tmp_path: Path, folder: Any) -> None:
        root = folder("cat", 3)
        (root / "dog").mkdir()
        assert "dog has no images" in self.complaint(capsys, tmp_path, "--data", root)

    def test_a_single_class(self, capsys: Any, tmp_path: Path, folder: Any) -> None:
        message = self.complaint(capsys, tmp_path, "--data", folder("cat", 3))
        assert "single class folder, cat" in message

    def test_classes_that_differ(self, capsys: Any, tmp_path: Path, folder: Any) -> None:
        for name in ("train/cat", "train/dog", "train/owl", "test/cat", "test/owl"):
            root = folder(name, 3)
        message = self.complaint(capsys, tmp_path, "--data", root)
        assert "only one has: dog" in message

    def test_fewer_images_than_a_batch(self, capsys: Any, tmp_path: Path, folder: Any) -> None:
        folder("cat", 10)
        message = self.complaint(capsys, tmp_path, "--data", folder("dog", 10))
        assert "16 training images are fewer than one batch of 128" in message

    def broken(self, folder: Any, name: str = "cat") -> Path:
        root: Path = folder("dog", 30)
        folder("cat", 30)
        whole = (root / name / "0.tif").read_bytes()
        (root / name / "cut.tif").write_bytes(whole[: len(whole) // 2])
        (root / name / "empty.png").write_bytes(b"")
        (root / name / "text.jpg").write_text("not a picture")
        (root / name / "gone.png").symlink_to("nowhere.png")
        (root / name / "notes.txt").write_text("not counted")
        return root

    def test_corrupt_files_are_counted_and_named(
        self, capsys: Any, tmp_path: Path, folder: Any
    ) -> None:
        message = self.complaint(capsys, tmp_path, "--data", self.broken(folder))
        assert "4 of 64 images" in message
        for name in ("cat/cut.tif", "cat/empty.png", "cat/gone.png", "cat/text.jpg"):
            assert name in message
        assert "--skip-corrupt" in message
        assert "notes.txt" not in message

    def test_of_many_corrupt_files_ten_are_named(
        self, capsys: Any, tmp_path: Path, folder: Any
    ) -> None:
        root = self.broken(folder)
        for i in range(20):
            (root / "dog" / f"bad{i:02d}.jpg").write_bytes(b"x")
        message = self.complaint(capsys, tmp_path, "--data", root)
        assert "24 of 84" in message
        assert "and 14 more" in message

    def test_corrupt_files_can_be_left_out(self, folder: Any) -> None:
        from experiments.data import from_folder

        images = from_folder(self.broken(folder), 16, skip_corrupt=True)
        assert len(images.corrupt) == 4
        assert len(images.train) + len(images.test) == 60
        assert images.train.shape[1:] == (3, 16, 16)

    def test_leaving_out_too_many_is_refused(
        self, capsys: Any, tmp_path: Path, folder: Any
    ) -> None:
        folder("dog", 5)
        root = folder("cat", 1)
        (root / "cat" / "bad.jpg").write_bytes(b"x")
        message = self.complaint(capsys, tmp_path, "--data", root, "--skip-corrupt")
        assert "cat has 1 images; a class needs 2" in message

    def test_foreign_out_is_left_alone(self, capsys: Any, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").write_text("years")
        assert call_demo("--smoke", "--out", tmp_path / "mine", "--overwrite") == 2
        assert "not empty" in capsys.readouterr().err
        assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"

    def test_download_without_a_network(
        self, capsys: Any, tmp_path: Path, monkeypatch: Any
    ) -> None:
        from urllib.error import URLError

        from experiments import data

        def unreachable(*_: Any, **__: Any) -> Any:
            raise URLError("Name or service not known")

        monkeypatch.setitem(data.TORCHVISION, "cifar10", unreachable)
        message = self.complaint(capsys, tmp_path, "--dataset", "cifar10")
        assert "cannot get cifar10" in message
        assert "Name or service not known" in message


class TestImages:
    @pytest.mark.parametrize(
        "mode", ["L", "1", "P", "RGBA", "CMYK", "LA", "I", "F", "I;16", "YCbCr"]
    )
    def test_every_mode_becomes_rgb(self, mode: str) -> None:
        from experiments.data import as_square

        grey = np.tile(np.linspace(0, 255, 30).astype(np.uint8), (20, 1))
        if mode == "I;16":
            image = Image.fromarray(grey.astype(np.uint16) * 257)
        else:
            image = Image.fromarray(grey).convert("RGB" if mode in ("CMYK", "YCbCr") else "L")
            image = image.convert(mode)
        assert image.mode == mode
        square = as_square(image, 16)
        assert (square.mode, square.size) == ("RGB", (16, 16))
        columns = np.asarray(square, dtype=float).mean(axis=(0, 2))
        assert columns[-1] - columns[0] > 100, "the ramp from dark to light is gone"

    def test_transparency_is_over_white(self) -> None:
        from experiments.data import as_rgb

        assert as_rgb(Image.new("RGBA", (4, 4), (9, 9, 9, 0))).getpixel((0, 0)) == (255, 255, 255)
        palette = Image.new("P", (4, 4), 0)
        palette.putpalette([9, 9, 9])
        palette.info["transparency"] = b"\0"
        assert as_rgb(palette).getpixel((0, 0)) == (255, 255, 255)

    def test_images_that_need_no_change_are_read_and_checked_too(self, tmp_path: Path) -> None:
        from experiments.data import ExperimentError, from_folder

        for name in ("cat", "dog"):
            (tmp_path / name).mkdir()
            for i in range(3):
                pixels = np.full((32, 32, 3), 40 * i + 7, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
        images = from_folder(tmp_path, 32, skip_corrupt=False)
        assert set(torch.cat([images.train, images.test]).unique().tolist()) == {7, 47, 87}
        whole = (tmp_path / "cat" / "0.png").read_bytes()
        (tmp_path / "cat" / "0.png").write_bytes(whole[: len(whole) - 30])
        with pytest.raises(ExperimentError, match=r"cat/0\.png"):
            from_folder(tmp_path, 32, skip_corrupt=False)

    def test_split_is_stratified_and_leaves_every_class_on_both_sides(self) -> None:
        from experiments.data import held_out

        labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 2)
        (_, train), (_, test) = held_out(torch.arange(72), labels)
        assert len(test) == round(0.2 * 72)
        for label, count in enumerate((50, 20, 2)):
            assert int((train == label).sum()) + int((test == label).sum()) == count
            assert abs(int((test == label).sum()) - 0.2 * count) <= 1
        assert int((test == 2).sum()) == 1

    def test_limit_is_met_exactly_and_stratified(self) -> None:
        from experiments.data import stratified

        labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
        kept = stratified(labels, 50)
        assert len(set(kept)) == 50
        assert labels[kept].bincount().tolist() == [30, 15, 5]
        assert kept == stratified(labels, 50)

    def test_a_test_folder_called_val_is_found(self, folder: Any) -> None:
        from experiments.data import from_folder

        for part, count in (("train", 5), ("val", 3)):
            for name in ("cat", "dog"):
                root = folder(f"{part}/{name}", count)
        images = from_folder(root, 16, skip_corrupt=False)
        assert (len(images.train), len(images.test)) == (10, 6)
        assert images.classes == ["cat", "dog"]

    def test_views_depend_on_seed_epoch_and_image_alone(self) -> None:
        from experiments.data import digits
        from experiments.views import Views

        images = digits(16)
        views = Views(images, "digits", seed=1)
        (first, second), label = views[3, 5]
        torch.rand(7)
        np.random.rand(7)
        (again, _), _ = views[3, 5]
        assert torch.equal(first, again)
        assert not torch.equal(first, second)
        assert not torch.equal(first, views[4, 5][0][0])
        assert label == int(images.train_labels[5])

    def test_ranks_share_a_global_batch_out(self) -> None:
        from experiments.views import EpochSampler

        whole, *shards = (EpochSampler(21, 8, 3, r, w) for r, w in ((0, 1), (0, 2), (1, 2)))
        for epoch in (0, 1):
            for sampler in (whole, *shards):
                sampler.set_epoch(epoch)
            everything, left, right = ([i for _, i in s] for s in (whole, *shards))
            assert len(everything) == len(whole) == 16
            assert everything[:8] == left[:4] + right[:4]
            assert len(left) == len(shards[0]) == 8
            assert len(set(everything)) == 16
        orders = []
        for epoch in (0, 1):
            whole.set_epoch(epoch)
            orders.append([i for _, i in whole])
        assert orders[0] != orders[1]


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--epochs", "0"], "--epochs must be at least 1, got 0"),
            (["--batch-size", "1"], "--batch-size must be at least 2"),
            (["--batch-size", "9", "--devices", "2"], "no multiple of --devices 2"),
            (["--num-clusters", "32", "1"], "--num-clusters must be at least 2, got 1"),
            (["--seeds", "1", "1"], "--seeds must be different"),
            (["--data", "a", "--dataset", "digits"], "exclude each other"),
            (["--dataset", "mnist"], "invalid choice: 'mnist'"),
            (["--methods", "dino"], "invalid choice: 'dino'"),
            (["--limit", "0"], "--limit must be at least 1"),
        ],
    )
    def test_mistakes_are_named(self, arguments: list[str], message: str, capsys: Any) -> None:
        from experiments import demo

        with pytest.raises(SystemExit) as ended:
            demo.main(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err

    def test_help(self, capsys: Any) -> None:
        from experiments import demo

        with pytest.raises(SystemExit) as ended:
            demo.main(["--help"])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        for option in ("--data", "--dataset", "--seeds", "--devices", "--overwrite", "--smoke"):
            assert option in shown


def test_collapsed_features_are_drawn_as_such(tmp_path: Path) -> None:
    from experiments import pictures

    rng = np.random.default_rng(0)
    features = {"sound": rng.normal(size=(12, 4)), "collapsed": np.ones((12, 4))}
    pictures.tsne(tmp_path / "tsne.png", features, np.arange(12) % 2, ["a", "b"], seed=0)
    assert (tmp_path / "tsne.png").stat().st_size > 1000
