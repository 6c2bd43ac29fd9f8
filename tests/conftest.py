"""What several tests share: small data, and real processes."""
from plumbing import data  # first: plumbing sets the threads of NumPy
import threading

import numpy as np
import pytest
from tqdm import tqdm

from generate import sample
from tests.processes import Three


# tqdm's own lock is shared with forked processes; one that mutmut kills may hold it for ever
tqdm.set_lock(threading.RLock())


def pytest_collection_modifyitems(items):
    """What needs TensorFlow comes first, so that only one worker of pytest-xdist imports it."""
    items.sort(key=lambda item: not item.get_closest_marker("tensorflow"))


def save(folder, x, y):
    """Write x.npy and y.npy; returns their paths."""
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    return folder / "x.npy", folder / "y.npy"


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """Paths of x.npy and y.npy with 4,000 examples, of which 200 are held out."""
    return save(tmp_path_factory.mktemp("small"), *sample(4000, seed=0))


@pytest.fixture
def loaded(small_data):
    return data.load(*small_data)


@pytest.fixture(scope="session")
def noisy_data(tmp_path_factory):
    """Paths of 40,000 examples. Eight of ten columns are noise, so layer 1 must learn."""
    x, y = sample(40_000, seed=0)
    noise = np.random.default_rng(0).uniform(-1, 1, (len(x), 8)).astype("f")
    return save(tmp_path_factory.mktemp("noisy"), np.column_stack([x, noise]), y)


@pytest.fixture(scope="session")
def small_digits(tmp_path_factory):
    """Paths of x.npy, (2000, 784), and y.npy, ten classes: blurred blobs, because MNIST is not in
    the repository."""
    rng = np.random.default_rng(0)
    classes = np.kron(rng.random((10, 7, 7)), np.ones((4, 4))).reshape(10, 784)
    y = rng.integers(10, size=2000)
    x = np.clip(classes[y] + rng.normal(0, 0.4, (2000, 784)), 0, 1).astype("f")
    return save(tmp_path_factory.mktemp("digits"), x, y)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """A real oracle and a real output trainer, without an input trainer, ready to answer."""
    with Three(tmp_path_factory.mktemp("servers")) as three:
        three.start("oracle", "output")
        three.wait_until_ready("oracle", "output")
        yield three
