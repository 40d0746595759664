"""A backbone out of a checkpoint: whole, or an error that lists what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from c2bin_ext.checkpoints import load_backbone


def network(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def checkpoint(trained: nn.Module, prefix: str = "backbone.") -> dict[str, Any]:
    weights = {prefix + name: value for name, value in trained.state_dict().items()}
    return {"epoch": 3, "state_dict": {"cluster_head.weight": torch.ones(2), **weights}}


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("form", ["file", "mapping", "state dict"])
def test_every_weight_and_buffer_arrives(form: str, tmp_path: Path) -> None:
    trained = network()
    trained(torch.randn(8, 3))  # moves the running statistics
    content = checkpoint(trained)
    given: Any = {"file": tmp_path / "last.ckpt", "mapping": content}.get(
        form, content["state_dict"]
    )
    torch.save(content, tmp_path / "last.ckpt")
    backbone = network().eval()
    assert load_backbone(given, backbone) is backbone
    assert same(backbone, trained)
    assert not backbone.training


def test_another_prefix() -> None:
    trained, follower = network(), network()
    content = checkpoint(trained)
    content["state_dict"].update(checkpoint(follower, "momentum_backbone.")["state_dict"])
    assert same(load_backbone(content, network(), prefix="momentum_backbone."), follower)


class Quantised(nn.Linear):
    """Keeps a state that is no tensor, as layers of low precision do."""

    scale = 1.0

    def get_extra_state(self) -> dict[str, float]:
        return {"scale": self.scale}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.scale = state["scale"]


def test_extra_state_arrives_and_other_entries_are_no_weights() -> None:
    trained = Quantised(3, 2)
    trained.scale = 4.0
    content = checkpoint(trained)["state_dict"] | {"backbone.epoch": 3}
    loaded = load_backbone(content, Quantised(3, 2))
    assert torch.equal(loaded.weight, trained.weight)
    assert loaded.scale == 4.0
    wrapped = {f"module.{name}": value for name, value in content.items()}
    with pytest.raises(ValueError, match=r"it would fit with prefix='module.backbone.'$"):
        load_backbone(wrapped, Quantised(3, 2))


def test_no_prefix_fits_a_backbone_without_weights() -> None:
    with pytest.raises(ValueError, match=r"got names that start with backbone., cluster_head.$"):
        load_backbone(checkpoint(network()), nn.ReLU(), prefix="encoder.")


def drop(weights: dict[str, Tensor]) -> None:
    del weights["backbone.2.bias"]


def add(weights: dict[str, Tensor]) -> None:
    weights["backbone.fc.weight"] = torch.ones(1)


def reshape(weights: dict[str, Tensor]) -> None:
    weights["backbone.0.weight"] = torch.ones(4, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"do not fit the backbone, Sequential; missing \(1\): 2.bias$"),
        (add, r"unexpected \(1\): fc.weight$"),
        (reshape, r"of another shape \(1\): 0.weight \(4, 5\) instead of \(4, 3\)$"),
    ],
)
def test_a_mismatch_is_an_error_and_loads_nothing(change: Any, message: str) -> None:
    content = checkpoint(network())
    change(content["state_dict"])
    backbone, before = network(), network()
    before.load_state_dict(backbone.state_dict())
    with pytest.raises(ValueError, match=message):
        load_backbone(content, backbone)
    assert same(backbone, before)


def test_all_kinds_of_mismatch_are_listed_and_long_lists_cut() -> None:
    content = checkpoint(network())
    for change in (drop, add, reshape):
        change(content["state_dict"])
    content["state_dict"].update({f"backbone.extra{i}": torch.ones(1) for i in range(20)})
    with pytest.raises(ValueError, match="missing") as caught:
        load_backbone(content, network())
    text = str(caught.value)
    assert "2.bias" in text
    assert "unexpected (21)" in text
    assert "and 13 more; of another shape (1): 0.weight" in text
    assert "(4, 5) instead of (4, 3)" in text


def test_a_list_that_just_fits_is_not_cut() -> None:
    content = checkpoint(network())
    content["state_dict"].update({f"backbone.extra{i}": torch.ones(1) for i in range(8)})
    with pytest.raises(ValueError, match=r"extra6, extra7$"):
        load_backbone(content, network())
    content["state_dict"]["backbone.last"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"extra6, extra7 and 1 more$"):
        load_backbone(content, network())


def test_an_empty_checkpoint() -> None:
    with pytest.raises(ValueError, match=r"got names that start with nothing$"):
        load_backbone({}, network())


def test_no_backbone_in_the_checkpoint() -> None:
    content = checkpoint(network(), prefix="encoder.")
    with pytest.raises(ValueError, match=r"start with 'backbone.', got .* encoder.; it would fit"):
        load_backbone(content, network())


@pytest.mark.parametrize(
    "inside", ["_orig_mod.backbone.", "module.backbone.", "backbone._orig_mod.", "backbone.module."]
)
def test_a_wrapped_model_s_prefix_is_named(inside: str) -> None:
    trained = network()
    content = checkpoint(trained, prefix=inside)
    content["state_dict"].update(checkpoint(network(5), inside + "other.")["state_dict"])
    with pytest.raises(ValueError, match=r"checkpoint: .*backbone\.") as caught:
        load_backbone(content, network())
    assert "would fit" not in str(caught.value)  # there is more than the backbone under it
    content = checkpoint(trained, prefix=inside)
    content["state_dict"].update(checkpoint(network(), "_orig_mod.follower.")["state_dict"])
    with pytest.raises(ValueError, match="it would fit with prefix=") as caught:
        load_backbone(content, network())
    for prefix in (inside, "_orig_mod.follower."):
        assert repr(prefix) in str(caught.value)
    assert same(load_backbone(content, network(), prefix=inside), trained)


class Settings:
    """Something that only full unpickling restores."""


def test_a_file_with_objects_names_the_way_out(tmp_path: Path) -> None:
    content = {**checkpoint(network()), "cfg": Settings()}
    torch.save(content, tmp_path / "last.ckpt")
    advice = "it holds objects other than weights and plain types, or is no checkpoint; if you "
    with pytest.raises(ValueError, match=advice + "trust the file, weights_only=False reads it"):
        load_backbone(tmp_path / "last.ckpt", network())
    load_backbone(tmp_path / "last.ckpt", network(), weights_only=False)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04cut off"])
def test_an_unreadable_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.ckpt"
    path.write_bytes(content)
    for weights_only in (True, False):
        with pytest.raises(ValueError, match=r"^checkpoint: cannot read .*broken.ckpt: ") as caught:
            load_backbone(path, network(), weights_only=weights_only)
        assert weights_only or "weights_only" not in str(caught.value)
        if content == b"not a checkpoint" and not weights_only:
            assert "broken.ckpt: it is no checkpoint (" in str(caught.value)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoint: there is no file"):
        load_backbone(tmp_path / "none.ckpt", network())
    with pytest.raises(TypeError, match=r"^backbone: expected a torch.nn.Module, got str$"):
        load_backbone({}, "resnet18")
    message = (
        "checkpoint: expected a path, a state dict or a mapping that holds one under 'state_dict'"
    )
    with pytest.raises(TypeError, match=f"^{message}, got int$"):
        load_backbone(3, network())
    with pytest.raises(TypeError, match=r"expected a mapping under 'state_dict', got list"):
        load_backbone({"state_dict": []}, network())
