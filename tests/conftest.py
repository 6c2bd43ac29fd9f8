"""What several tests share: small data, and three real processes."""
import numpy as np
import pytest

from generate import sample
from tests.processes import Three, wait_until


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """Paths of x.npy and y.npy with 4,000 examples, of which 200 are held out."""
    folder = tmp_path_factory.mktemp("small")
    x, y = sample(4000, seed=0)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    return folder / "x.npy", folder / "y.npy"


@pytest.fixture(scope="session")
def noisy_data(tmp_path_factory):
    """The same with 200,000 examples, and eight columns of noise beside the two that count: layer 1 must learn."""
    folder = tmp_path_factory.mktemp("noisy")
    x, y = sample(200_000, seed=0)
    np.save(folder / "x.npy", np.column_stack([x, np.random.default_rng(0).uniform(-1, 1, (len(x), 8)).astype("f")]))
    np.save(folder / "y.npy", y)
    return folder / "x.npy", folder / "y.npy"


@pytest.fixture(scope="session")
def small_digits(tmp_path_factory):
    """Paths of x.npy, (2000, 784), and y.npy, ten classes: blurred blobs, for MNIST is not in the repository."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("digits")
    classes = np.kron(rng.random((10, 7, 7)), np.ones((4, 4))).reshape(10, 784)
    y = rng.integers(10, size=2000)
    np.save(folder / "x.npy", np.clip(classes[y] + rng.normal(0, 0.4, (2000, 784)), 0, 1).astype("f"))
    np.save(folder / "y.npy", y)
    return folder / "x.npy", folder / "y.npy"


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """A real oracle and a real output trainer, without an input trainer, ready to answer."""
    with Three(tmp_path_factory.mktemp("servers")) as three:
        three.start("oracle", "output")
        for name in ("oracle", "output"):
            wait_until(lambda: three.processes[name].poll() is None and three.status(name), f"{name} to answer")
        wait_until(lambda: three.status("oracle")["ready"], "TensorFlow to start")
        yield three
