"""c2bin_explore: what it reads, what it writes, that it resumes, and the page itself."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

pytest.importorskip("lightly")
pytest.importorskip("sklearn")

from c2bin_explore import analysis, main, training
from c2bin_explore import images as files
from c2bin_explore import page as pages
from sklearn.metrics import normalized_mutual_info_score

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
import itertools

import _chromium

sys.path.pop(0)

# torch and Lightning calling what torch is about to drop is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*")

QUICK = ("--epochs", "2", "--image-size", "16", "--device", "cpu")
# A folder "…<" and a file "script>…" in it: as a path, the end of a script element.
EVIL = "<b></script><img src=x onerror=alert(1)> \"quoted\" & 'co'.png"


def solid(index: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """An image of one colour that no other index has."""
    return Image.new("RGB", size, (index * 37 % 200 + 20, index * 71 % 200 + 20, index * 13 % 200))


def messy(folder: Path) -> tuple[set[str], dict[str, str]]:
    """Fill a folder; return the images that are to be read, and why others are not."""
    good: dict[str, Image.Image] = {
        "holiday photos/größe ä.png": solid(1),
        f"holiday photos/{EVIL}": solid(2),
        "holiday photos/deep/er/pan orama.jpg": solid(3, (900, 10)),
        "holiday photos/one pixel.png": solid(4, (1, 1)),
        "scans/grey.png": Image.linear_gradient("L"),
        "scans/cmyk.jpg": Image.new("CMYK", (30, 50), (0, 200, 200, 0)),
        "scans/alpha.png": Image.new("RGBA", (30, 30), (200, 0, 0, 0)),
        "scans/deep.png": Image.new("I;16", (30, 30), 65535),
        "scans/palette.gif": solid(5).convert("P"),
        "scans/bits.bmp": Image.new("1", (30, 30), 1),
        "scans/float.tiff": Image.new("F", (30, 30), 0.25),
        "scans/no suffix": solid(6),
    }
    for i in range(7, 20):
        good[f"more/{i}.webp"] = solid(i)
    for name, image in good.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format=None if path.suffix else "PNG")
    frames = [solid(21), solid(22)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    solid(23, (60, 20)).save(folder / "turned.jpg", exif=exif)

    (folder / "empty.jpg").touch()
    (folder / "broken.png").write_bytes((folder / "scans/grey.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes((folder / "scans/grey.png").read_bytes())
    (folder / "scans" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.jpg")
    # Drawn by Ghostscript, were it not left out.
    solid(24).save(folder / "program.eps")
    bad = {
        "empty.jpg": "empty file",
        "broken.png": "broken",
        "notes.txt": "not an image",
        ".hidden.png": "hidden",
        "scans/loop": "link to a folder",
        "gone.png": "cannot be read",
        "pipe.jpg": "neither file nor folder",
        "program.eps": "not an image",
    }
    return {*good, "animated.gif", "turned.jpg"}, bad


class Scripts(HTMLParser):
    """Collects what a browser would see of a page: elements, attributes, contents of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: dict[str, str] = {}
        self.text: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = dict(attrs).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        self.text[self.open] = self.text.get(self.open, "") + data


def read_page(page: Path) -> tuple[Scripts, dict[str, Any]]:
    """Return the parsed page and its data, arrays unpacked, thumbnails in the images' order."""
    parsed = Scripts(page.read_text(encoding="utf-8"))
    data = json.loads(parsed.text["data"])

    def unpack(text: str, kind: str) -> list[Any]:
        raw = base64.b64decode(text)
        return list(struct.unpack(f"<{len(raw) // struct.calcsize(kind)}{kind}", raw))

    for name, kind in {"labels": "i", "place": "I", "neighbours": "I", "cosines": "f"}.items():
        data[name] = unpack(data[name], kind)
    data["positions"] = unpack(data["positions"], "f")
    for scale in data["scales"]:
        scale["cluster"] = unpack(scale["cluster"], "H")
        scale["certainty"] = unpack(scale["certainty"], "f")
    chunks = [name for name in parsed.text if name.startswith("thumbnails-")]
    urls = [url for i in range(len(chunks)) for url in json.loads(parsed.text[f"thumbnails-{i}"])]
    data["thumbnails"] = [urls[place] for place in data["place"]]
    return parsed, data


def opened(url: str) -> Image.Image:
    """Return the image of a data URL."""
    head, _, body = url.partition(",")
    assert re.fullmatch(r"data:image/(webp|jpeg);base64", head)
    return Image.open(io.BytesIO(base64.b64decode(body)))


def table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


class Run:
    """One run of the command on the messy folder."""

    def __init__(self, base: Path, capture: Callable[[], Any]) -> None:
        self.folder, self.out = base / "my <b>folder<⁄b>", base / "out"
        self.good, self.bad = messy(self.folder)
        self.status = main([str(self.folder), "--out", str(self.out), *QUICK])
        self.terminal = capture()
        self.parsed, self.data = read_page(self.out / "index.html")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The messy folder, explored once."""
    from contextlib import redirect_stdout

    text = io.StringIO()
    with redirect_stdout(text):
        return Run(tmp_path_factory.mktemp("run"), text.getvalue)


def test_messy_folder_is_read_and_the_rest_is_named(run: Run) -> None:
    assert run.status == 0
    assert set(run.data["names"]) == run.good
    skipped = dict(run.data["skipped"])
    assert set(skipped) == set(run.bad)
    for name, reason in run.bad.items():
        assert skipped[name].startswith(reason), (name, skipped[name])
        assert name in run.terminal
    assert table(run.out / "skipped.csv") == [
        {"file": name, "reason": reason} for name, reason in run.data["skipped"]
    ]
    assert f"{len(run.bad)} skipped" in run.terminal
    assert not (run.out / "unfinished").exists()


def test_thumbnails_show_their_own_image(run: Run) -> None:
    """Solid colours: a thumbnail in a wrong place has a wrong colour."""
    names = run.data["names"]
    for i in range(7, 20):
        shown = np.asarray(opened(run.data["thumbnails"][names.index(f"more/{i}.webp")]))
        wanted = np.array(solid(i).getpixel((0, 0)))
        assert np.abs(shown.reshape(-1, 3).mean(axis=0) - wanted).max() < 6, i
    sizes = {name: opened(run.data["thumbnails"][names.index(name)]).size for name in names}
    assert sizes["turned.jpg"] == (20, 60)
    assert sizes["holiday photos/one pixel.png"] == (1, 1)
    assert sizes["more/7.webp"] == (40, 30)
    assert sizes["holiday photos/deep/er/pan orama.jpg"][0] == 160


def test_page_holds_nothing_but_itself(run: Run) -> None:
    """File names stay text; no element asks for anything; scripts other than ours do not run."""
    tags = run.parsed.tags
    scripts = [attributes for tag, attributes in tags if tag == "script"]
    code = [attributes for attributes in scripts if attributes.get("type") is None]
    assert len(code) == 1
    assert not [tag for tag, _ in tags if tag in ("img", "link", "iframe", "b", "object")]
    assert not [attributes for _, attributes in tags if "src" in attributes]
    links = [attributes["href"] for _, attributes in tags if "href" in attributes]
    assert all(str(link).startswith("#") for link in links)
    policy = next(a["content"] for t, a in tags if t == "meta" and "http-equiv" in a)
    assert policy is not None
    for kind in ("script", "style"):
        digest = hashlib.sha256(run.parsed.text[kind].encode()).digest()
        assert f"{kind}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert run.parsed.text["title"] == "my <b>folder<⁄b> – clusters"


def expected_outputs(run: Run) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Features and assignments of the images that Pillow alone crops and scales as it must."""
    model, settings = training.load(run.out / "model.ckpt")
    weights = torch.load(run.out / "model.ckpt", weights_only=True)["state_dict"]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    rows = []
    for name in run.data["names"]:
        with Image.open(run.folder / name) as image:
            square = ImageOps.fit(image.convert("RGB"), (16, 16), Image.Resampling.BICUBIC)
            rgb = square if name.startswith("more/") else None
        pixels = np.zeros((16, 16, 3)) if rgb is None else np.asarray(rgb)
        rows.append(((torch.tensor(pixels).float() / 255 - mean) / std).permute(2, 0, 1))
    with torch.no_grad():
        features = model.eval().backbone(torch.stack(rows))
    lengths = features.square().sum(dim=1, keepdim=True).sqrt()
    directions = features.shape[1] ** 0.5 * features / lengths
    logits = directions @ weights["criterion.head.linear.weight"].T
    logits += weights["criterion.head.linear.bias"]
    ends = np.cumsum([0, *settings.clusters])
    return features, [logits[:, a:b].softmax(dim=1) for a, b in itertools.pairwise(ends)]


def test_assignments_are_the_models(run: Run) -> None:
    """The page's and the table's numbers against the stored weights, by hand."""
    _, heads = expected_outputs(run)
    rows = table(run.out / "assignments.csv")
    assert [row["file"] for row in rows] == run.data["names"]
    compared = 0
    for i, (name, row) in enumerate(zip(run.data["names"], rows, strict=True)):
        for scale, assignments in zip(run.data["scales"], heads, strict=True):
            cluster = scale["cluster"][i]
            assert int(row[f"{scale['name']}_cluster"]) == cluster
            certainty = float(row[f"{scale['name']}_certainty"])
            assert certainty == pytest.approx(scale["certainty"][i], rel=1e-6)
            if name.startswith("more/"):
                compared += 1
                assert certainty == pytest.approx(float(assignments[i].max()), abs=1e-5)
                assert float(assignments[i, cluster]) == pytest.approx(certainty, abs=1e-5)
    assert compared == 3 * 13


def test_labels_and_scores(run: Run) -> None:
    """First-level folders are classes; NMI is scikit-learn's; images in no folder have none."""
    assert run.data["classes"] == ["holiday photos", "more", "scans"]
    firsts = [name.split("/")[0] if "/" in name else None for name in run.data["names"]]
    labels = [run.data["classes"].index(first) if first else -1 for first in firsts]
    assert run.data["labels"] == labels
    keep = [i for i, label in enumerate(labels) if label >= 0]
    assert len(keep) == len(labels) - 2
    for scale in run.data["scales"]:
        nmi = normalized_mutual_info_score(
            [labels[i] for i in keep], [scale["cluster"][i] for i in keep]
        )
        assert scale["scores"]["nmi"] == pytest.approx(nmi, abs=1e-9)
        assert scale["scores"]["in_use"] == len(set(scale["cluster"]))


def test_neighbours_agree_in_page_and_table(run: Run) -> None:
    names, k = run.data["names"], run.data["neighbourCount"]
    assert k == 12
    rows = table(run.out / "neighbours.csv")
    assert len(rows) == len(names) * k
    for position, row in enumerate(rows):
        assert row["file"] == names[position // k]
        assert int(row["rank"]) == position % k + 1
        assert row["neighbour"] == names[run.data["neighbours"][position]] != row["file"]
        assert float(row["cosine"]) == pytest.approx(run.data["cosines"][position], rel=1e-6)


def test_nearest_against_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "_BLOCK", 7)
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    indices, cosines = analysis.nearest(features, 6)
    for i in range(40):
        others = []
        for j in range(40):
            if j != i:
                a, b = features[i].double(), features[j].double()
                others.append((float(a @ b / (a.norm() * b.norm())), j))
        best = sorted(others, reverse=True)[:6]
        assert indices[i].tolist() == [j for _, j in best]
        np.testing.assert_allclose(cosines[i], [cosine for cosine, _ in best], atol=1e-5)
    assert analysis.nearest(features[:3], 6)[0].shape == (3, 2)


def test_map_keeps_groups_apart_beyond_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two far groups: every image, in the sample of t-SNE or not, lies with its own group."""
    monkeypatch.setattr(analysis, "_MAP_SAMPLE", 60)
    draw = torch.Generator().manual_seed(2)
    group = torch.arange(150) % 2
    features = torch.randn(150, 8, generator=draw) * 0.1 + torch.eye(8)[group]
    positions, method = analysis.layout(features, seed=0)
    assert "60 images drawn at random" in method
    assert positions.shape == (150, 2)
    assert positions.min() >= 0
    assert positions.max() <= 1
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=2) + 9 * np.eye(150)
    assert (group.numpy()[distances.argmin(axis=1)] == group.numpy()).all()
    again, _ = analysis.layout(features, seed=0)
    np.testing.assert_array_equal(positions, again)


@pytest.mark.parametrize("n", [2, 3, 8, 9, 12])
def test_map_of_few_and_equal_images(n: int) -> None:
    for features in (torch.ones(n, 4), torch.randn(n, 4)):
        positions, _ = analysis.layout(features, seed=0)
        assert np.isfinite(positions).all()


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (Image.new("I;16", (2, 2), 65535), (255, 255, 255)),
        (Image.new("I;16", (2, 2), 1023), (255, 255, 255)),
        (Image.new("I;16", (2, 2), 200), (200, 200, 200)),
        (Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
        (Image.new("LA", (2, 2), (0, 255)), (0, 0, 0)),
        (Image.new("RGBA", (2, 2), (200, 0, 0, 255)), (200, 0, 0)),
        (Image.new("CMYK", (2, 2), (255, 0, 0, 0)), (0, 255, 255)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("L", (2, 2), 77), (77, 77, 77)),
    ],
)
def test_every_mode_becomes_rgb(image: Image.Image, pixel: tuple[int, int, int]) -> None:
    rgb = files.to_rgb(image)
    assert rgb.mode == "RGB"
    assert rgb.getpixel((0, 0)) == pixel


def test_float_images_are_stretched() -> None:
    values = np.array([[-1.0, 0.0], [float("nan"), 3.0]], dtype=np.float32)
    grey = np.asarray(files.to_rgb(Image.fromarray(values)))[:, :, 0]
    assert grey.tolist() == [[0, 64], [64, 255]]


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    solid(1).save(tmp_path / "a.gif", save_all=True, append_images=[solid(2)])
    result = files._read(tmp_path / "a.gif", 8, 8)
    assert not isinstance(result, str)
    assert np.abs(result[0][0, 0].astype(int) - solid(1).getpixel((0, 0))).max() <= 8


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, and line breaks: shown with escapes, linked by their bytes."""
    folder = tmp_path / "in"
    folder.mkdir()
    raw = [b"caf\xe9.png", b"line\nbreak.png", b"\x1b[31mred.png"]
    for i, name in enumerate(raw):
        try:
            solid(i).save(os.fsdecode(os.fsencode(folder) + b"/" + name), format="PNG")
        except OSError:
            pytest.skip("this file system wants UTF-8")
    assert main([str(folder), "--out", str(tmp_path / "out"), *QUICK]) == 0
    data = read_page(tmp_path / "out" / "index.html")[1]
    shown = {"caf\\xe9.png", "line\\x0abreak.png", "\\x1b[31mred.png"}
    assert set(data["names"]) == shown
    assert {link.encode() for link in data["links"].values()} == {
        b"caf%E9.png",
        b"line%0Abreak.png",
        b"%1B%5B31mred.png",
    }
    assert {row["file"] for row in table(tmp_path / "out" / "assignments.csv")} == shown


def few(folder: Path, count: int = 12) -> Path:
    """Make a folder of solid images in two classes."""
    for i in range(count):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        solid(i).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Return what was trained."""
    state: dict[str, torch.Tensor] = torch.load(out / "model.ckpt", weights_only=True)["state_dict"]
    return state


def test_interrupted_run_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = few(tmp_path / "in")
    options = [str(folder), "--epochs", "3", "--image-size", "16", "--device", "cpu", "--out"]
    assert main([*options, str(tmp_path / "whole")]) == 0
    out = tmp_path / "parts"
    reads, read = list[Path](), files._read

    def counted(path: Path, *sizes: int) -> Any:
        reads.append(path)
        return read(path, *sizes)

    monkeypatch.setattr(files, "_read", counted)
    with monkeypatch.context() as patch:

        def ctrl_c(self: Any, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

        patch.setattr(training._Progress, "on_train_batch_end", ctrl_c)
        assert main([*options, str(out)]) == 130
    assert "same command goes on" in capsys.readouterr().err
    assert torch.load(out / "unfinished" / "training.ckpt", weights_only=True)["epoch"] == 1

    # Another command must not end somebody's unfinished run.
    assert main([*options, str(out), "--seed", "5"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*options, str(out)]) == 0
    assert "Going on" in capsys.readouterr().out
    assert len(reads) == 12  # the second time they came from the part
    whole, parts = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    pages_ = [(tmp_path / name / "index.html").read_bytes() for name in ("whole", "parts")]
    assert pages_[0] == pages_[1]
    assert not (out / "unfinished").exists()


def test_every_epoch_has_an_order_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of an epoch share no image; seed and epoch decide the order."""
    monkeypatch.setattr(training._Progress, "on_train_epoch_end", lambda *_: None)
    pixels = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    orders: list[list[list[int]]] = []
    for seed in (0, 0, 1):
        seen: list[list[int]] = []

        def get(self: Any, indices: torch.Tensor, seen: list[list[int]] = seen) -> torch.Tensor:
            seen.append(indices.tolist())
            return pixels[indices]

        monkeypatch.setattr(training._Pixels, "__getitem__", get)
        settings = training.Settings("small", 16, (2, 3, 4), 3, 5, seed)
        training.train(pixels, settings, tmp_path / f"{len(orders)}.ckpt", "cpu")
        assert [len(batch) for batch in seen] == [5] * 6
        for epoch in range(3):
            assert len({*seen[2 * epoch], *seen[2 * epoch + 1]}) == 10
        orders.append(seen)
    assert orders[0] == orders[1] != orders[2]
    assert len({tuple(orders[0][2 * epoch]) for epoch in range(3)}) == 3


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = few(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    assert main([str(folder), "--out", str(out), *QUICK]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main([str(folder), "--out", str(out), *QUICK, "--seed", "1"]) == 1
    assert "index.html" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main([str(folder), "--out", str(out), *QUICK, "--seed", "1", "--overwrite"]) == 0
    assert (out / "index.html").read_bytes() != before["index.html"]
    assert (out / "mine.txt").read_text() == "kept"


def test_checkpoint_serves_other_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same image gets the same assignments in another folder; nothing is trained."""
    first, out = few(tmp_path / "in"), tmp_path / "out"
    assert main([str(first), "--out", str(out), *QUICK]) == 0
    second = few(tmp_path / "new", 4)
    again = tmp_path / "again"
    model = ["--checkpoint", str(out / "model.ckpt"), "--device", "cpu"]
    capsys.readouterr()
    assert main([str(second), "--out", str(again), *model]) == 0
    assert "Training" not in capsys.readouterr().err
    old = {row["file"]: row for row in table(out / "assignments.csv")}
    rows = table(again / "assignments.csv")
    assert len(rows) == 4
    for row in rows:
        for column in ("coarse_certainty", "middle_certainty", "fine_certainty"):
            assert float(row[column]) == pytest.approx(float(old[row["file"]][column]), abs=1e-5)
    data = read_page(again / "index.html")[1]
    assert data["settings"]["Training"].startswith("none on these images")
    # Into its own folder: the model must outlive what it replaces.
    trained = weights(out)
    own = [str(second), "--out", str(out), *model, "--overwrite"]
    assert main(own) == 0
    assert all(torch.equal(value, weights(out)[name]) for name, value in trained.items())

    for options, word in (
        (["--epochs", "3"], "--epochs"),
        (["--image-size", "64"], "--image-size"),
        (["--clusters", "2", "3", "5"], "--clusters"),
        (["--backbone", "resnet18"], "--backbone"),
    ):
        capsys.readouterr()
        assert main([str(second), "--out", str(tmp_path / "no"), *model, *options]) == 1
        assert word in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def foreign(path: Path) -> Path:
    """Write a checkpoint of another program."""
    torch.save({"state_dict": {"backbone.weight": torch.ones(2)}}, path)
    return path


def wrong_shape(path: Path) -> Path:
    """Write a checkpoint whose weights and settings disagree."""
    settings = training.Settings("small", 32, (2, 3, 4), 1, 8, 0)
    training.save(
        training.build(settings), training.Settings("small", 32, (2, 3, 9), 1, 8, 0), path
    )
    return path


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda t: t / "none", [], "there is no folder"),
        (lambda t: foreign(t / "file"), [], "is a file"),
        (lambda t: t, [], "no files"),
        (lambda t: few(t / "one", 1).parent, [], "at least 2 images"),
        (lambda t: (t / "a.jpg").write_bytes(b"x") and t, [], "got 0"),
        (lambda t: few(t), ["--epochs", "0"], "--epochs"),
        (lambda t: few(t), ["--image-size", "4"], "--image-size"),
        (lambda t: few(t), ["--seed", "-1"], "--seed"),
        (lambda t: few(t), ["--clusters", "2", "3", "13"], "at most 12"),
        (lambda t: few(t), ["--clusters", "4", "3", "2"], "coarse to fine"),
        (lambda t: few(t), ["--clusters", "1", "3", "4"], "at least 2"),
        (lambda t: few(t), ["--checkpoint", "nowhere.ckpt"], "there is no file"),
    ],
)
def test_errors_say_what_to_do(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], Path],
    options: list[str],
    words: str,
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    folder = make(source)
    assert main([str(folder), "--out", str(tmp_path / "out"), "--device", "cpu", *options]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "index.html").exists()


@pytest.mark.parametrize("make", [foreign, wrong_shape])
def test_checkpoint_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Path]
) -> None:
    folder = few(tmp_path / "in")
    assert main([str(folder), "--checkpoint", str(make(tmp_path / "x.ckpt"))]) == 1
    assert "does not fit" in capsys.readouterr().err


@pytest.mark.skipif(not torch.backends.cuda.is_built() or torch.cuda.is_available(), reason="GPU")
def test_device_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(few(tmp_path / "in")), "--device", "cuda"]) == 1
    assert "--device auto" in capsys.readouterr().err


def test_unreadable_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder itself is an error, one inside it is reported. (Root may read everything.)"""
    folder, scan = few(tmp_path / "in"), os.scandir

    def denied(name: str) -> Callable[[Any], Any]:
        def scandir(path: Any) -> Any:
            if Path(path).name == name:
                raise PermissionError(13, "Permission denied")
            return scan(path)

        return scandir

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", denied("b"))
        paths, skipped = files.find(folder, exclude=tmp_path / "out")
    assert len(paths) == 6
    assert skipped == [("b", "folder cannot be read: Permission denied")]
    monkeypatch.setattr(os, "scandir", denied("in"))
    with pytest.raises(files.ExploreError, match="Permission denied"):
        files.find(folder, exclude=tmp_path / "out")


def test_output_inside_the_folder_is_no_input(tmp_path: Path) -> None:
    folder = few(tmp_path / "in")
    few(folder / "out", 2)
    paths, skipped = files.find(folder, exclude=folder / "out")
    assert len(paths) == 12
    assert not skipped


def test_changed_file_is_read_again(tmp_path: Path) -> None:
    folder, cache = few(tmp_path / "in", 4), tmp_path / "cache"
    paths, _ = files.find(folder, exclude=cache)
    before = files.read_all(folder, paths, 8, 8, cache).pixels
    solid(99, (50, 50)).save(folder / paths[0])
    after = files.read_all(folder, paths, 8, 8, cache).pixels
    assert (before[0] != after[0]).any()
    np.testing.assert_array_equal(before[1:], after[1:])


def test_default_clusters_fit_every_folder() -> None:
    for n in range(2, 3000):
        counts = training.default_clusters(n)
        assert sorted(counts) == list(counts)
        assert min(counts) >= 2
        assert max(counts) <= min(n, training.LARGEST_BATCH)
        assert n < 4 or len(set(counts)) == 3


def test_views_keep_grey_grey_and_stay_in_range() -> None:
    torch.manual_seed(0)
    grey = torch.full((64, 3, 16, 16), 128, dtype=torch.uint8)
    views = training.view(grey)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    restored = views * std + mean
    assert float(restored.std(dim=(1, 2, 3)).max()) < 1e-4
    assert float(restored.amin()) > 0.5 * 0.35
    assert float(restored.amax()) <= 1 + 1e-6
    noise = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    torch.manual_seed(1)
    first = training.view(noise)
    torch.manual_seed(1)
    assert torch.equal(first, training.view(noise))
    assert not torch.equal(first, training.view(noise))


def test_budget_shrinks_all_thumbnails() -> None:
    noise = [files.encode(Image.effect_noise((160, 160), 80).convert("RGB"), 160) for _ in range(3)]
    budget = sum(map(len, noise)) // 5
    smaller = files.fit_budget(noise, 160, budget)
    assert sum(map(len, smaller)) <= budget
    sides = {Image.open(io.BytesIO(image)).size for image in smaller}
    assert len(sides) == 1
    assert 8 <= max(sides)[0] < 160
    assert files.fit_budget(noise, 160, sum(map(len, noise))) is noise


def test_parquet_holds_what_the_csv_holds(run: Run) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow")
    for name in ("assignments", "neighbours"):
        rows = parquet.read_table(run.out / f"{name}.parquet").to_pylist()
        text = [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
        assert text == table(run.out / f"{name}.csv")


def test_without_pyarrow_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And leaves no Parquet file of an earlier run beside the new CSV."""
    monkeypatch.setattr(analysis, "has_parquet", lambda: False)
    out = tmp_path / "out"
    out.mkdir()
    (out / "neighbours.parquet").write_bytes(b"of an earlier run")
    assert main([str(few(tmp_path / "in")), "--out", str(out), *QUICK, "--overwrite"]) == 0
    assert "pip install pyarrow" in capsys.readouterr().out
    assert not list(out.glob("*.parquet"))


browser = pytest.mark.skipif(_chromium.missing() is not None, reason=str(_chromium.missing()))


def styles(dark: bool) -> dict[str, tuple[float, ...]]:
    """Return the colours of the template's scheme as linear light."""
    css = (Path(pages.__file__).parent / "page.css").read_text()
    block = css[css.index("prefers-color-scheme: dark") :] if dark else css
    found: dict[str, tuple[float, ...]] = {}
    for name, value in re.findall(r"--([\w-]+): #([0-9a-f]{6})", block):
        channels = [int(value[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        found.setdefault(
            name,
            tuple(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels),
        )
    return found


@pytest.mark.parametrize("dark", [False, True])
def test_contrast_is_aa(dark: bool) -> None:
    """WCAG 2 AA: 4.5 for text on what it stands on, 3 for lines and marks."""
    light = {name: 0.2126 * r + 0.7152 * g + 0.0722 * b for name, (r, g, b) in styles(dark).items()}

    def contrast(a: str, b: str) -> float:
        high, low = max(light[a], light[b]), min(light[a], light[b])
        return (high + 0.05) / (low + 0.05)

    for text in ("text", "quiet", "link"):
        for ground in ("back", "raised"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    assert contrast("text", "chosen") >= 4.5
    for mark in ("line", "focus"):
        assert contrast(mark, "back") >= 3


@browser
def test_page_in_a_browser(run: Run, tmp_path: Path) -> None:
    """Browse, search, open, zoom, by mouse and keyboard; no request, no error."""
    data, k = run.data, run.data["neighbourCount"]
    with _chromium.Browser(tmp_path / "profile") as page:
        page.open(run.out / "index.html")
        cards = page.run("return document.querySelectorAll('.card').length")
        assert cards == len(set(data["scales"][0]["cluster"]))
        page.wait("[...document.querySelectorAll('main img')].every(i => i.naturalWidth > 1 || "
                  "i.parentNode.title.includes('one pixel'))")  # fmt: skip

        # A cluster page shows its members, most typical first.
        largest = max(set(data["scales"][0]["cluster"]), key=data["scales"][0]["cluster"].count)
        page.run("location.hash = arguments[0]", f"#/cluster/0/{largest}")
        page.wait("document.activeElement.textContent.startsWith('Coarse cluster')")
        members = [i for i, c in enumerate(data["scales"][0]["cluster"]) if c == largest]
        members.sort(key=lambda i: (-data["scales"][0]["certainty"][i], i))
        shown = page.run(
            "return [...document.querySelector('main .images').querySelectorAll('.image')]"
            ".map(b => b.title)"
        )
        assert shown == [data["names"][i] for i in members][: min(24, -(-len(members) // 2))]

        # Click an image: its neighbours, in order. Escape: back to where it was.
        page.click("main .image")
        page.wait("document.querySelector('dialog').open")
        near = page.run("return [...document.querySelectorAll('dialog .image')].map(b => b.title)")
        first = members[0] * k
        assert near == [data["names"][j] for j in data["neighbours"][first : first + k]]
        page.keys("Escape")
        page.wait("!document.querySelector('dialog').open")
        assert page.run("return document.activeElement.title") == data["names"][members[0]]
        page.keys("Enter")
        page.wait("document.querySelector('dialog').open")
        page.click("dialog .close")

        # Search by name; the name that is HTML is text.
        page.run("document.getElementById('query').focus()")
        page.keys(*"ONERROR")
        page.wait("location.hash === '#/search/ONERROR'")
        found = page.run("return [...document.querySelectorAll('main .image')].map(b => b.title)")
        assert found == [name for name in data["names"] if "onerror" in name]
        assert len(found) == 1
        page.click("main .image")
        page.wait("document.querySelector('dialog').open")
        assert page.run("return document.getElementById('detail-name').textContent") == found[0]
        link = page.run("return document.querySelector('dialog a[target]').href")
        assert Path(urllib.request.url2pathname(link.removeprefix("file://"))) == (
            run.folder.resolve() / found[0]
        )

        # The map by keyboard: zoom in, and Enter opens the image at the cross.
        page.run("location.hash = '#/map'")
        page.wait("document.querySelector('canvas')?.dataset.visible > 0")
        everything = int(page.run("return document.querySelector('canvas').dataset.visible"))
        assert everything == len(data["names"])
        page.run("document.querySelector('canvas').focus()")
        page.keys("+", "+", "+", "+", "+", "Right")
        page.wait(f"Number(document.querySelector('canvas').dataset.visible) < {everything}")
        page.keys("Enter")
        page.wait("document.querySelector('dialog').open")
        page.keys("Escape")
        page.wait("!document.querySelector('dialog').open")
        page.keys("0")
        page.wait(f"Number(document.querySelector('canvas').dataset.visible) === {everything}")

        # And by mouse: the point under the pointer opens.
        box = page.run("const b = document.querySelector('canvas').getBoundingClientRect();"
                       "return [b.left, b.top, b.width, b.height]")  # fmt: skip
        side = min(box[2:]) - 40
        x = box[0] + box[2] / 2 + (data["positions"][0] - 0.5) * side
        y = box[1] + box[3] / 2 + (data["positions"][1] - 0.5) * side
        page.point(x, y)
        page.wait("!document.querySelector('.tip').hidden")
        page.point(x, y, press=True)
        page.wait("document.querySelector('dialog').open")
        page.keys("Escape")

        # Everything that can be reached by Tab shows that it has the focus.
        page.run("location.hash = '#/about'")
        page.wait("document.getElementById('skipped')")
        reached = set()
        for _ in range(9):
            page.keys("Tab")
            focus = page.run("const e = document.activeElement; return [e.tagName, e.textContent, "
                             "getComputedStyle(e).outlineStyle]")  # fmt: skip
            assert focus[0] == "BODY" or focus[2] != "none", focus
            reached.add(focus[1])
        assert {"Clusters", "Map", "All images", "About"} <= reached
        text = page.run("return document.getElementById('skipped').textContent")
        assert all(name in text for name in run.bad)

        page.size(320, 640)
        for route in ("clusters", "map", "search/", "about", f"cluster/0/{largest}", "image/1"):
            page.run("location.hash = arguments[0]", f"#/{route}")
            page.wait("location.hash.length > 2")
            assert page.run("return document.documentElement.scrollWidth") <= 320, route
        assert page.errors() == []
        assert page.requests() == [(run.out / "index.html").resolve().as_uri()]


@browser
def test_no_script_of_a_name_runs(run: Run, tmp_path: Path) -> None:
    """Even markup that reached the page could not run: the policy knows one script alone."""
    with _chromium.Browser(tmp_path / "profile") as page:
        page.open(run.out / "index.html")
        page.run("window.ran = 0; const s = document.createElement('script');"
                 "s.textContent = 'window.ran = 1'; document.body.append(s);"
                 "new Image().src = 'http://127.0.0.1:9/x.png';")  # fmt: skip
        assert page.run("return window.ran") == 0
        blocked = page.errors()
        assert len([line for line in blocked if "Content Security Policy" in line]) == 2


class TestCommand:
    """The ways to call it, each in a process of its own."""

    @staticmethod
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        # Without the variable that CI sets: what an ordinary shell shows.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)

    def test_the_package_is_the_command(self) -> None:
        done = self.run("-m", "c2bin_explore", "no such folder")
        assert done.returncode == 1
        assert done.stderr == "c2bin-explore: there is no folder no such folder\n"

    def test_the_former_place_works_and_says_where_it_is_now(self) -> None:
        done = self.run("-m", "c2bin_lightly.explore", "no such folder")
        assert done.returncode == 1
        assert "DeprecationWarning" in done.stderr
        assert "python -m c2bin_explore" in done.stderr
        assert done.stderr.endswith("c2bin-explore: there is no folder no such folder\n")

    @pytest.mark.parametrize("module", ["PIL", "lightly", "tqdm"])
    def test_without_its_extra_it_says_so_in_one_line(self, module: str) -> None:
        program = f"import sys; sys.modules[{module!r}] = None; import c2bin_explore as c"
        done = self.run("-c", f"{program}; sys.exit(c.main(['.']))")
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert 'pip install "c2bin-ext[explore]"' in line
