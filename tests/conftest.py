"""What several tests share: small data, and three real processes."""
import numpy as np
import pytest

from generate import sample
from tests.processes import Three, wait_until


def data(folder, num_examples):
    x, y = sample(num_examples, seed=0)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    return folder / "x.npy", folder / "y.npy"


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """Paths of x.npy and y.npy with 4,000 examples, of which 200 are held out."""
    return data(tmp_path_factory.mktemp("small"), 4000)


@pytest.fixture(scope="session")
def large_data(tmp_path_factory):
    """The same with 200,000 examples, as the reading group uses them."""
    return data(tmp_path_factory.mktemp("large"), 200_000)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """A real oracle and a real output trainer, without an input trainer, ready to answer."""
    with Three(tmp_path_factory.mktemp("servers")) as three:
        three.start("oracle", "output")
        for name in ("oracle", "output"):
            wait_until(lambda: three.processes[name].poll() is None and three.status(name), f"{name} to answer")
        yield three
