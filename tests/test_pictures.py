"""plot.py, and the live page in a real browser."""
import io
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from plumbing.runs import Progress
from sgd import make_layers
from tests.processes import ROOT, Three, end, free_ports, start, wait_until


def write_run(folder, dims, rows=3):
    score = "test_mse" if dims[-1] == 1 else "test_error"
    progress = Progress(folder, ["seconds", "examples", "epoch", score, "gradient_cosine"], {})
    for n in range(rows):
        layers = make_layers(dims, np.random.default_rng(n))
        progress.write([(layer.w, layer.b) for layer in layers], seconds=5.0 * n, examples=1000 * n, epoch=0.1 * n,
                       gradient_cosine=0.3, **{score: 0.2 / (n + 1)})


def plot(folder, *args):
    return subprocess.run([sys.executable, ROOT / "plot.py", *args], cwd=folder, capture_output=True, text=True)


def test_every_snapshot_becomes_a_picture_and_all_of_them_an_animation(tmp_path):
    write_run(tmp_path / "progress", [2, 5, 1])
    write_run(tmp_path / "sgd_progress", [2, 5, 1])
    (tmp_path / "progress" / "snapshot_000001.npz").write_bytes(b"torn")
    done = plot(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "snapshot_000001.npz is not a whole file of arrays" in done.stderr
    pictures = sorted(path.name for path in (tmp_path / "synthetic_plots").iterdir())
    assert pictures == ["surface_000000.png", "surface_000002.png"]
    first, last = (np.asarray(Image.open(tmp_path / "synthetic_plots" / name).convert("RGB")) for name in pictures)
    assert (first != last).mean() > 0.01
    assert Image.open(tmp_path / "learning.gif").n_frames == 2
    assert np.asarray(Image.open(tmp_path / "learning_curves.png").convert("L")).std() > 5


def test_runs_of_the_same_name_are_both_drawn_and_a_torn_newest_snapshot_is_left_out(tmp_path):
    write_run(tmp_path / "a" / "run", [2, 5, 1])
    write_run(tmp_path / "b" / "run", [2, 5, 1])
    (tmp_path / "a" / "run" / "snapshot_000002.npz").write_bytes(b"torn")
    done = plot(tmp_path, "a/run", "b/run")
    assert done.returncode == 0 and Image.open(tmp_path / "learning.gif").n_frames == 2, done.stderr
    both = (tmp_path / "learning_curves.png").read_bytes()
    assert plot(tmp_path, "b/run").returncode == 0 and (tmp_path / "learning_curves.png").read_bytes() != both


@pytest.mark.parametrize("dims", [[3, 4, 1], [784, 4, 10]])
def test_other_than_two_inputs_cannot_be_drawn_and_it_says_so(dims, tmp_path):
    write_run(tmp_path / "run", dims)
    done = plot(tmp_path, "run")
    assert done.returncode == 0 and f"over {dims[0]} input columns cannot be drawn" in done.stdout
    assert (tmp_path / "learning_curves.png").exists() and not (tmp_path / "learning.gif").exists()


def test_plot_without_runs_says_what_writes_them(tmp_path):
    done = plot(tmp_path)
    assert done.returncode == 2 and "no folder here holds a run" in done.stderr
    assert plot(tmp_path, "nowhere").returncode == 2


@pytest.fixture
def browser(tmp_path):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver; .ci/run installs them where it may")
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 f"--user-data-dir={tmp_path / 'chromium'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(tmp_path):
    """The live page's own process for three that run in tmp_path: page(three) -> its address."""
    started = []

    def serve(three):
        port = free_ports(1)[0]
        servers = [f"--{who}-server=127.0.0.1:{three.port(who)}" for who in ("oracle", "output", "input")]
        started.append(start("plot.py", "--live", three.progress, "--port", port, *servers, log=tmp_path / "page.log"))
        wait_until(lambda: f"127.0.0.1:{port}" in (tmp_path / "page.log").read_text(), "the live page")
        return f"http://127.0.0.1:{port}/"
    yield serve
    assert [end(process) for process in started] == [0] and "Traceback" not in (tmp_path / "page.log").read_text()


def test_the_live_page_shows_a_run_that_goes_on_and_says_when_something_is_wrong(browser, page, tmp_path, small_data):
    with Three(tmp_path, input=[*small_data, "--num-epochs", 10**6, "--snapshot-seconds", 1]) as three:
        three.start()
        wait_until(lambda: (three.status("input") or {}).get("test_mse"), "training to start")
        browser.set_window_size(390, 844)
        browser.get(page(three))

        def pixels():
            image = browser.find_element("id", "surface")
            if not browser.execute_script("return arguments[0].complete && arguments[0].naturalWidth", image):
                return None
            return np.asarray(Image.open(io.BytesIO(image.screenshot_as_png)).convert("RGB")).astype(int)

        def text():
            return browser.find_element("tag name", "body").text
        wait_until(lambda: (shot := pixels()) is not None and shot.std() > 20, "a picture of the surface")
        first = pixels()
        wait_until(lambda: (shot := pixels()) is not None and shot.shape == first.shape and (shot != first).any(),
                   "the picture to change as training goes on")
        for words in ("training along synthetic gradients", "of at most 20", "waits for the oracle", "examples sent",
                      "gradient cosine", "has learned from update"):
            assert words in text()
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
        three.kill("oracle")
        wait_until(lambda: "waited for: oracle" in text(), "the page to say that the oracle is gone")
        three.start("oracle")
        wait_until(lambda: "waited for" not in text(), "the page to see the oracle again")
        three.kill("input")
        wait_until(lambda: "does not answer" in text(), "the page to say that the input trainer is gone")


def test_the_live_page_says_that_training_is_finished(browser, page, tmp_path, small_data):
    with Three(tmp_path, input=[*small_data, "--num-epochs", 20]) as three:
        three.start()
        browser.get(page(three))
        assert three.wait_for_input(60) == 0
        wait_until(lambda: "training is finished" in browser.find_element("id", "state").text, "the page to say so")
