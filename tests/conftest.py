"""What several tests share: small data, and three real processes."""
import numpy as np
import pytest

from generate import sample
from tests.processes import Three, wait_until


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """Paths of x.npy and y.npy with 4,000 examples, of which 200 are held out."""
    folder = tmp_path_factory.mktemp("data")
    x, y = sample(4000, seed=0)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    return folder / "x.npy", folder / "y.npy"


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """A real oracle and a real output trainer, without an input trainer, ready to answer."""
    with Three(tmp_path_factory.mktemp("servers")) as three:
        three.start("oracle", "output")
        for name in ("oracle", "output"):
            wait_until(lambda: three.processes[name].poll() is None and three.status(name), f"{name} to answer")
        yield three
