"""C2BINClustering: scikit-learn's conventions, what it finds, what it refuses, what it leaves."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score, mutual_info_score
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks

from c2bin_ext import MultiScaleClusterLoss, clustering
from c2bin_ext.clustering import C2BINClustering
from tests.conftest import Complains

SMALL: dict[str, Any] = {"hidden_features": 16, "max_epochs": 20, "random_state": 0}


class AtLeastTwo(C2BINClustering):
    """Five of scikit-learn's checks set n_clusters=1, of which there is no contrast: they get 2.

    That 1 is refused is tested below.
    """

    def _checked_options(self) -> Any:
        if self.n_clusters != 1:
            return super()._checked_options()
        return C2BINClustering(**{**self.get_params(), "n_clusters": 2})._checked_options()


# Checks of 20 rows and 2 features collapse a head now and then, and are warned.
@pytest.mark.filterwarnings("ignore:Scale . of")
@parametrize_with_checks([AtLeastTwo(n_clusters=2, hidden_features=16, max_epochs=20)])
def test_scikit_learn(estimator: C2BINClustering, check: Callable[[Any], None]) -> None:
    check(estimator)


def blobs(n: int = 300, d: int = 8, k: int = 4, seed: int = 0) -> tuple[Any, Any]:
    source = np.random.default_rng(seed)
    labels = np.arange(n) % k
    centres = 4 * source.normal(size=(k, d))
    return (centres[labels] + source.normal(size=(n, d))).astype(np.float32), labels


@pytest.fixture(scope="module")
def data() -> tuple[Any, Any]:
    return blobs()


@pytest.fixture(scope="module")
def model(data: tuple[Any, Any]) -> C2BINClustering:
    return C2BINClustering((4, 8), **SMALL).fit(data[0])


def test_finds_clusters(data: tuple[Any, Any], model: C2BINClustering) -> None:
    features, classes = data
    assert adjusted_rand_score(classes, model.labels_) > 0.95
    new, new_classes = features[::3] + 0.1, classes[::3]
    assert adjusted_rand_score(new_classes, model.predict(new)) > 0.95


def test_attributes(data: tuple[Any, Any], model: C2BINClustering) -> None:
    features, _ = data
    assert model.n_features_in_ == 8
    assert model.n_iter_ == len(model.losses_) <= 20
    assert model.loss_ == model.losses_[-1] < model.losses_[0]
    assert len(model.labels_per_scale_) == 2
    for scale, k in enumerate((4, 8)):
        labels = model.labels_per_scale_[scale]
        assert labels.dtype == np.int64
        assert set(labels) <= set(range(k))
        probabilities = model.predict_proba(features, scale=scale)
        assert probabilities.shape == (300, k)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1)
        np.testing.assert_array_equal(probabilities.argmax(axis=1), labels)
        np.testing.assert_array_equal(model.predict(features, scale=scale), labels)
    np.testing.assert_array_equal(model.labels_, model.labels_per_scale_[0])


def test_one_scale_may_be_an_int(data: tuple[Any, Any]) -> None:
    model = C2BINClustering(4, **SMALL).fit(data[0])
    assert model.predict_proba(data[0]).shape == (300, 4)


def test_random_state_fixes_the_result(data: tuple[Any, Any], model: C2BINClustering) -> None:
    again = clone(model).fit(data[0])
    assert again.losses_ == model.losses_
    np.testing.assert_array_equal(again.predict_proba(data[0]), model.predict_proba(data[0]))
    other = clone(model).set_params(random_state=1).fit(data[0])
    assert other.losses_ != model.losses_


@pytest.mark.parametrize("seed", [None, 3])
def test_global_random_states_are_left_alone(data: tuple[Any, Any], seed: int | None) -> None:
    before = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    C2BINClustering(4, **{**SMALL, "random_state": seed}).fit(data[0])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == pickle.dumps(np.random.get_state())


def test_fits_where_gradients_are_off(data: tuple[Any, Any], model: C2BINClustering) -> None:
    with torch.no_grad():
        again = clone(model).fit(data[0])
    assert again.losses_ == model.losses_


@pytest.mark.parametrize("convert", [torch.from_numpy, np.ndarray.tolist, np.asfortranarray])
def test_forms_of_input(
    data: tuple[Any, Any], model: C2BINClustering, convert: Callable[[Any], Any]
) -> None:
    features = convert(data[0])
    again = clone(model).fit(features)
    np.testing.assert_allclose(again.losses_, model.losses_, rtol=1e-4)
    np.testing.assert_array_equal(again.predict(features), model.labels_)


def test_bfloat16_tensor_that_needs_gradient(data: tuple[Any, Any]) -> None:
    features = torch.from_numpy(data[0]).bfloat16().requires_grad_()
    assert adjusted_rand_score(data[1], C2BINClustering(4, **SMALL).fit_predict(features)) > 0.95


def test_memory_map_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside 20 MB of float16 on the disk, numpy never holds a copy, let alone a wider one."""
    monkeypatch.setattr(clustering, "_BLOCK", 2**16)
    monkeypatch.setattr(clustering, "_DIRECTIONS", 4)
    monkeypatch.setattr(clustering, "_PART", 1000)
    monkeypatch.setattr(clustering, "_faiss_is_installed", lambda: False)
    features, classes = blobs(n=40_000, d=256)
    path = tmp_path / "features.npy"
    np.save(path, features.astype(np.float16))
    del features
    mapped = np.load(path, mmap_mode="r")
    model = C2BINClustering(4, n_neighbors=3, **{**SMALL, "max_epochs": 1})
    model.fit(mapped[:100])  # what is imported on the way is no copy
    tracemalloc.start()
    model.fit(mapped)
    labels = model.predict(mapped)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert adjusted_rand_score(classes, labels) > 0.9
    assert peak < 15_000_000


def test_views(data: tuple[Any, Any]) -> None:
    """Two groups that lie apart count as one cluster where views move between them."""
    features, classes = data
    moved = features[np.argsort(classes ^ 1, kind="stable")[np.argsort(np.argsort(classes))]]
    views = np.stack([features, moved]).astype(np.float16)
    model = C2BINClustering(2, **{**SMALL, "max_epochs": 60}).fit(features, views=views)
    assert adjusted_rand_score(classes // 2, model.labels_) > 0.95
    from_tensor = clone(model).fit(torch.from_numpy(features), views=torch.from_numpy(views))
    np.testing.assert_array_equal(from_tensor.labels_, model.labels_)


def test_pickle(data: tuple[Any, Any], model: C2BINClustering) -> None:
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(data[0]), model.predict_proba(data[0]))
    assert again.get_params() == model.get_params()


def test_pipeline(data: tuple[Any, Any], model: C2BINClustering) -> None:
    doubled = make_pipeline(FunctionTransformer(lambda x: 2 * x), clone(model))
    doubled.fit(data[0], c2binclustering__views=2 * data[0][None])
    np.testing.assert_array_equal(doubled.predict(data[0]), doubled[-1].labels_)
    assert adjusted_rand_score(data[1], doubled.predict(data[0])) > 0.95


def test_grid_search(data: tuple[Any, Any]) -> None:
    search = GridSearchCV(
        C2BINClustering(**SMALL), {"n_clusters": [2, 4]}, scoring="adjusted_rand_score", cv=2
    )
    assert search.fit(*data).best_params_ == {"n_clusters": 4}


def test_ends_when_the_loss_does(data: tuple[Any, Any]) -> None:
    options = {**SMALL, "max_epochs": 400, "learning_rate": 0.01}
    model = C2BINClustering(4, **options).fit(data[0])
    assert 10 < model.n_iter_ < 400
    assert min(model.losses_[-10:]) > min(model.losses_[:-10]) - 1e-3


def test_interrupted(data: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = MultiScaleClusterLoss
    calls = iter(range(1000))

    def interrupted(*args: Any) -> Any:
        if next(calls) == 25:
            raise KeyboardInterrupt
        return forward(*args)

    forward = criterion.forward
    monkeypatch.setattr(criterion, "forward", interrupted)
    model = C2BINClustering(4, **SMALL)
    with pytest.warns(UserWarning, match="Interrupted after 5 of 20 epochs"):
        model.fit(data[0])
    assert model.n_iter_ == 5
    assert adjusted_rand_score(data[1], model.labels_) > 0.9
    np.testing.assert_array_equal(model.predict(data[0]), model.labels_)


def test_never_far_below_k_means() -> None:
    """On blobs that overlap, where neighbours mislead: it starts from k-means."""
    source = np.random.default_rng(1)
    classes = np.arange(400) % 5
    features = 1.2 * source.normal(size=(5, 6))[classes] + source.normal(size=(400, 6))
    model = C2BINClustering(5, random_state=0).fit(features)
    rows = (features - features.mean(axis=0)) / features.std(axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    floor = adjusted_rand_score(classes, KMeans(5, n_init=10, random_state=0).fit_predict(rows))
    assert adjusted_rand_score(classes, model.labels_) > floor - 0.05


def test_progress(data: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    C2BINClustering(4, **SMALL).fit(data[0])
    assert capsys.readouterr() == ("", "")
    C2BINClustering(4, **SMALL, verbose=True).fit(data[0])
    assert "300 rows of 8 features" in (text := capsys.readouterr().out)
    assert 10 < text.count("epoch ") <= 20


def test_callback_hears_of_every_epoch(data: tuple[Any, Any], model: C2BINClustering) -> None:
    heard: list[tuple[int, float]] = []
    again = clone(model).fit(data[0], callback=lambda *epoch: heard.append(epoch))
    assert heard == list(enumerate(model.losses_, 1))
    np.testing.assert_array_equal(again.predict_proba(data[0]), model.predict_proba(data[0]))
    assert pickle.loads(pickle.dumps(again)).get_params() == model.get_params()


def test_callback_may_end_training(data: tuple[Any, Any], model: C2BINClustering) -> None:
    def enough(epoch: int, loss: float) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="Interrupted after 3 of 20 epochs"):
        ended = clone(model).fit(data[0], callback=enough)
    assert ended.losses_ == model.losses_[:3]


def test_neighbours_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "_BLOCK", 1000)
    rows = torch.nn.functional.normalize(torch.randn(200, 5))
    found = clustering._nearest(rows, 7, seed=0)
    oracle = NearestNeighbors(n_neighbors=8, algorithm="brute").fit(rows).kneighbors(rows)[1]
    np.testing.assert_array_equal(found, oracle[:, 1:])


@pytest.mark.skipif(sys.platform != "linux", reason="others count in other units, or not at all")
def test_neighbours_are_found_in_bounded_memory() -> None:
    """Of 12,000 rows, all products are 576 MB: in a process of its own, as it counts the most."""
    program = (
        "import resource, torch\n"
        "from c2bin_ext import clustering\n"
        "most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "rows = torch.randn(12_000, 8)\n"
        "clustering._nearest(rows[:100], 5, 0)\n"
        "before = most()\n"
        "clustering._nearest(rows, 5, 0)\n"
        "print(most() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert int(done.stdout) < 150_000, "kB"


def test_neighbours_of_many_rows_are_of_their_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "_PART", 50)
    monkeypatch.setattr(clustering, "_faiss_is_installed", lambda: False)
    rows = torch.nn.functional.normalize(torch.randn(200, 5))
    found = clustering._nearest(rows, 3, seed=0)
    assert not (found == torch.arange(200)[:, None]).any()
    assert all(len(set(own)) == 3 for own in found.tolist())
    similarity = (rows[:, None] * rows[found]).sum(dim=2)
    assert float(similarity.mean()) > 0.5


def test_neighbours_of_many_rows_by_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="pip install faiss-cpu")
    features, _ = blobs(n=3000, d=16, k=6)
    features[:50] = features[0]  # equal rows come before the row itself
    rows = torch.nn.functional.normalize(torch.from_numpy(features))
    exact = NearestNeighbors(n_neighbors=6).fit(rows).kneighbors()[1]
    monkeypatch.setattr(clustering, "_PART", 500)
    found = clustering._nearest(rows, 6, seed=0)
    own = torch.arange(len(rows))[:, None]
    assert not (found == own).any()
    assert ((found >= 0) & (found < len(rows))).all()
    shared = [len({*a} & {*b}) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]
    assert sum(shared[50:]) / 6 / len(shared[50:]) > 0.9
    assert torch.equal(found, clustering._nearest(rows, 6, seed=0))


def test_agreement_is_the_mutual_information_of_neighbours_labels(
    data: tuple[Any, Any], model: C2BINClustering
) -> None:
    rows = model._project(data[0]).numpy()
    near = NearestNeighbors(n_neighbors=20).fit(rows).kneighbors()[1]
    for labels, agreement in zip(model.labels_per_scale_, model.agreement_per_scale_, strict=True):
        # Every pair in both directions, as neighbours need not be mutual.
        own = np.concatenate([labels.repeat(20), labels[near].ravel()])
        other = np.concatenate([labels[near].ravel(), labels.repeat(20)])
        expected = mutual_info_score(own, other) / mutual_info_score(own, own)
        assert agreement == pytest.approx(expected, abs=1e-6)


def test_one_cluster_agrees_in_nothing() -> None:
    pairs = clustering._Pairs(
        torch.zeros(1, 4, 2), torch.tensor([[1], [0], [3], [2]]), torch.ones(4), 0
    )
    assert pairs.agreement(torch.ones(1, 4, dtype=torch.int64), 3) == 0
    assert pairs.agreement(torch.tensor([[0, 0, 2, 2]]), 3) == pytest.approx(1)
    assert pairs.agreement(torch.tensor([[0, 2, 0, 2]]), 3) == pytest.approx(1), (
        "a swap is known too"
    )


def test_views_that_show_nothing_leave_the_rows_in_charge(data: tuple[Any, Any]) -> None:
    features, classes = data
    noise = np.random.default_rng(0).permuted(features, axis=0)[None]
    model = C2BINClustering(4, entropy_weight=1.0, **SMALL).fit(features, views=noise)
    assert adjusted_rand_score(classes, model.labels_) > 0.9


def test_agreement_of_views_is_of_what_the_views_share() -> None:
    nearest = torch.arange(1, 2001)[:, None] % 2000
    pairs = clustering._Pairs(torch.zeros(2, 2000, 1), nearest, torch.ones(2000), 0)
    halves = torch.arange(2000) // 1000
    assert pairs.agreement(torch.stack([halves, halves]), 2) > 0.95
    noise = torch.randint(2, (2000,))
    # Both are halves in a quarter of the pairs: 0.046 is expected.
    assert 0.015 < pairs.agreement(torch.stack([halves, noise]), 2) < 0.09
    assert pairs.agreement(torch.stack([noise, noise]), 2) < 0.01


@pytest.fixture(scope="module")
def noise() -> Any:
    return np.random.default_rng(0).normal(size=(120, 3))


def test_k_means_is_kept_where_it_agrees_more(noise: Any) -> None:
    model = C2BINClustering((4, 7), **SMALL).fit(noise)
    assert model.entropy_weight_ is None
    rows = model._project(noise).numpy()
    for labels, k in zip(model.labels_per_scale_, (4, 7), strict=True):
        # What k-means ends with: every row is nearest to the mean of its own cluster.
        means = np.stack([rows[labels == cluster].mean(axis=0) for cluster in range(k)])
        distances = np.square(rows[:, None] - means).sum(axis=2)
        np.testing.assert_array_equal(distances.argmin(axis=1), labels)
    probabilities = model.predict_proba(noise)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert 0.3 < probabilities.max(axis=1).mean() < 0.999


def test_ctrl_c_while_other_weights_are_tried(noise: Any) -> None:
    heard: list[int] = []

    def second(epoch: int, loss: float) -> None:
        heard.append(epoch)
        if heard.count(1) == 2:
            raise KeyboardInterrupt

    finished = C2BINClustering((4, 7), **SMALL).fit(noise)
    with pytest.warns(UserWarning, match="Interrupted after 1 of 20 epochs") as caught:
        ended = C2BINClustering((4, 7), **SMALL).fit(noise, callback=second)
    assert caught[0].filename == __file__
    assert heard.count(1) == 2
    assert ended.entropy_weight_ is None
    np.testing.assert_array_equal(ended.labels_, finished.labels_)


def test_a_given_weight_is_trained_with(noise: Any) -> None:
    assert C2BINClustering(4, entropy_weight=0.5, **SMALL).fit(noise).entropy_weight_ == 0.5


def test_unequal_classes_get_a_smaller_weight() -> None:
    features, classes = make_blobs([1000, 100, 50, 20], 20, cluster_std=5, random_state=0)
    options = {"n_clusters": (4, 8), "random_state": 0}
    auto = C2BINClustering(**options).fit(features)
    one = C2BINClustering(**options, entropy_weight=1).fit(features)
    assert auto.entropy_weight_ in (0.1, 0.03)
    assert auto.agreement_per_scale_[0] > one.agreement_per_scale_[0]
    found, even = (adjusted_rand_score(classes, model.labels_) for model in (auto, one))
    assert found > even + 0.05


def test_rows_move_as_neighbours_differ() -> None:
    views = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [10.0, 0.0], [10.0, 3.0]]])
    nearest = torch.tensor([[1], [0], [3], [2]])
    rows, source = torch.zeros(64, dtype=torch.int64), torch.Generator().manual_seed(0)
    pairs = clustering._Pairs(views, nearest, torch.ones(4), 0.5)
    drawn = {tuple(row) for row in pairs.draw(rows, source).tolist()}
    assert drawn == {(-0.5, 0.0), (0.5, 0.0), (0.0, -1.5), (0.0, 1.5)}
    still = clustering._Pairs(views, nearest, torch.ones(4), 0)
    assert not still.draw(rows, source).any()


def test_batches_are_random_and_pass_through_all_rows() -> None:
    source = torch.Generator().manual_seed(0)
    batches = clustering._batches(10, 5, source, torch.device("cpu"))
    first, second = (torch.cat([next(batches), next(batches)]).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != list(range(10))


def test_mutual_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "_PART", 30)
    nearest = torch.tensor([[1, 2], [0, 2], [3, 1], [2, 0], [0, 1]])
    neighbors, counts = clustering._mutual(nearest)
    assert counts.tolist() == [1, 2, 2, 1, 1]
    assert neighbors[:4, 0].tolist() == [1, 0, 3, 2]
    assert neighbors[4, 0] == 0, "none is mutual: the nearest"


def test_collapse_is_warned_of() -> None:
    labels = [np.array([0] * 99 + [1]), np.arange(100) % 20]
    with pytest.warns(UserWarning, match="Scale 0 of 20 clusters has collapsed: 2 hold a row"):
        clustering._warn_of_collapse(labels, (20, 20))


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"n_clusters": 1}, ValueError, "n_clusters"),
    ({"n_clusters": ()}, ValueError, "n_clusters"),
    ({"n_clusters": (4, 2.5)}, ValueError, "n_clusters"),
    ({"n_clusters": "10"}, ValueError, "n_clusters"),
    ({"n_neighbors": 0}, ValueError, "n_neighbors"),
    ({"hidden_features": 0}, ValueError, "hidden_features"),
    ({"max_epochs": 0}, ValueError, "max_epochs"),
    ({"batch_size": 1}, ValueError, "batch_size"),
    ({"max_epochs": True}, ValueError, "max_epochs"),
    ({"learning_rate": 0.0}, ValueError, "learning_rate"),
    ({"learning_rate": np.nan}, ValueError, "learning_rate"),
    ({"temperature": 0}, ValueError, "temperature"),
    ({"entropy_weight": -1.0}, ValueError, "entropy_weight"),
    ({"entropy_weight": "some"}, ValueError, "entropy_weight"),
    ({"device": "abacus"}, RuntimeError, "abacus"),
]


@pytest.mark.parametrize(("options", "kind", "name"), WRONG, ids=[str(row[0]) for row in WRONG])
def test_wrong_options(
    data: tuple[Any, Any], options: dict[str, Any], kind: type[Exception], name: str
) -> None:
    with pytest.raises(kind, match=name):
        C2BINClustering(**{"n_clusters": 4, **options}).fit(data[0])


def test_wrong_features(
    data: tuple[Any, Any], model: C2BINClustering, complains: Complains
) -> None:
    features, _ = data
    spoilt = features.copy()
    spoilt[7, 3] = np.nan
    with complains(ValueError, "X", "NaN"):
        clone(model).fit(spoilt)
    with complains(ValueError, "X", "NaN"):
        model.predict(spoilt)
    spoilt[7, 3] = np.inf
    with complains(ValueError, "X", "infinity"):
        clone(model).fit(spoilt)
    with complains(ValueError, "X", "1 sample"):
        clone(model).fit(features[:1])
    with complains(ValueError, "X", "at least 8 rows", "7 samples"):
        clone(model).fit(features[:7])
    with complains(ValueError, "X has 5 features", "expecting 8 features"):
        model.predict(features[:, :5])
    for scale in (2, -1, 0.5):
        with complains(ValueError, "scale", f"got {scale}"):
            model.predict(features, scale=scale)


def test_wrong_views(data: tuple[Any, Any], model: C2BINClustering, complains: Complains) -> None:
    features, _ = data
    for views in (features, features[None, :-1], features[None, :, :-1], features[None][:0]):
        with complains(ValueError, ("views", "0 sample")):
            clone(model).fit(features, views=views)
    spoilt = features[None].copy()
    spoilt[0, 7, 3] = np.nan
    with complains(ValueError, "views", "NaN"):
        clone(model).fit(features, views=spoilt)


def test_without_scikit_learn() -> None:
    program = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import c2bin_ext\n"
        "try:\n    import c2bin_ext.clustering\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'c2bin-ext[eval]'" in done.stdout
