"""plot.py, and the live page in a real browser."""
import contextlib
import http.server
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

import plot
from plumbing import bar, live, new_figure
from plumbing.pictures import log_ticks, png
from plumbing.runs import Progress, read_snapshot, snapshots
from sgd import make_layers
from tests.processes import ROOT, Three, end, free_ports, start, wait_until


def weights(dims, seed=0):
    return [(layer.w, layer.b) for layer in make_layers(dims, np.random.default_rng(seed))]


def a_probe(units=4, seed=0):
    """True gradients of some units, and guesses that are right but for noise."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (200, 2))
    g = np.stack([np.sin(2 * x[:, 0] + unit) * x[:, 1] for unit in range(units)], axis=1)
    return {"x": x, "g": g, "guess": g + rng.normal(0, 0.1, g.shape)}


def write_run(folder, dims, probes=(None,) * 3, **options):
    score = "test_mse" if dims[-1] == 1 else "test_error"
    columns = ["seconds", "examples", "epoch", score, "gradient_cosine"]
    progress = Progress(folder, columns, options)
    for n, probe in enumerate(probes):
        progress.write(weights(dims, n), probe, seconds=5.0 * n, examples=1000 * n, epoch=0.1 * n,
                       gradient_cosine=0.3, **{score: 0.2 / (n + 1)})


def run_plot(folder, *args, **environment):
    return subprocess.run([sys.executable, ROOT / "plot.py", *args], cwd=folder,
                          capture_output=True, text=True, env={**os.environ, **environment})


def frames(path):
    """How long each frame of an animation is shown, in milliseconds."""
    with Image.open(path) as movie:
        durations = []
        for n in range(movie.n_frames):
            movie.seek(n)
            durations.append(movie.info["duration"])
    return durations


def written(folder):
    return sorted(path.name for path in (folder / "synthetic_plots").iterdir())


@pytest.mark.processes
def test_every_snapshot_becomes_a_picture_and_all_of_them_an_animation(tmp_path):
    write_run(tmp_path / "sgd_progress", [2, 5, 1])
    write_run(tmp_path / "progress", [2, 5, 1])
    (tmp_path / "progress" / "snapshot_000001.npz").write_bytes(b"torn")
    done = run_plot(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("snapshot_000001.npz is not a whole file of arrays") == 1
    pictures = written(tmp_path)
    assert pictures == ["surface_000000.png", "surface_000002.png"]
    first, last = (np.asarray(Image.open(tmp_path / "synthetic_plots" / name).convert("RGB"))
                   for name in pictures)
    assert (first != last).mean() > 0.01
    assert len(frames(tmp_path / "learning.gif")) == 2
    assert np.asarray(Image.open(tmp_path / "learning_curves.png").convert("L")).std() > 5


@pytest.mark.processes
def test_pictures_are_drawn_whatever_the_users_matplotlib_is_set_to(tmp_path):
    write_run(tmp_path / "progress", [2, 5, 1])
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: No Such Font\n")
    done = run_plot(tmp_path, MPLBACKEND="no_such_backend")
    assert done.returncode == 0 and "font" not in done.stderr, done.stderr
    assert len(written(tmp_path)) == 3


@pytest.mark.processes
def test_a_character_that_a_pipe_cannot_show_is_a_question_mark(tmp_path):
    done = run_plot(tmp_path, "--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "the oracle's guess ?" in done.stdout


@pytest.mark.processes
def test_a_process_that_draws_nothing_does_not_import_matplotlib():
    program = "import sys, plot, train_output, plumbing.launch; print('matplotlib' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], cwd=ROOT) == b"False\n"


def test_a_log_gets_a_line_of_progress_now_and_then(monkeypatch):
    now, log = [0.0], io.StringIO()
    monkeypatch.setattr(bar.time, "monotonic", lambda: now[0])
    with bar.progress_bar(total=1000, file=log, mininterval=0) as shown:
        for _ in range(1000):
            now[0] += 0.1
            shown.update()
            shown.set_postfix_str("held-out")
    lines = log.getvalue().splitlines()
    assert [line.split("%")[0].strip() for line in lines] == ["0", "30", "60", "90", "100"]
    assert "\r" not in log.getvalue()


def test_nobody_reads_the_log_any_more_and_training_goes_on():
    class Broken(io.StringIO):
        def write(self, _):
            raise BrokenPipeError
    with bar.progress_bar(total=3, file=Broken(), mininterval=0) as shown:
        shown.update(2)
        shown.set_postfix_str("held-out")


def test_a_terminal_gets_a_bar_that_moves(monkeypatch):
    monkeypatch.setattr(bar.sys.stderr, "isatty", lambda: True, raising=False)
    with bar.progress_bar(total=3, file=(terminal := io.StringIO()), mininterval=0) as shown:
        shown.update(2)
    assert terminal.getvalue().count("\r") > 1


def test_the_animation_pauses_at_its_end_and_has_at_most_40_frames(tmp_path):
    paths = []
    for n in range(50):
        paths.append(tmp_path / f"{n}.png")
        Image.new("RGB", (8, 8), (5 * n, 0, 0)).save(paths[-1])
    plot.animate(paths, tmp_path / "movie.gif")
    durations = frames(tmp_path / "movie.gif")
    assert len(durations) == 40 and durations[-1] >= 5 * max(durations[:-1])


def test_guesses_at_two_points_span_no_surface_and_it_says_so():
    probe = dict.fromkeys(("x", "g", "guess"), np.eye(2, dtype="f"))
    with pytest.raises(plot.NotDrawable, match="fewer than three examples"):
        plot.draw_guess(None, [], {"seconds": 0.0, "examples": 0}, probe)


@pytest.mark.processes
def test_guesses_are_drawn_beside_the_true_gradients_where_a_snapshot_holds_them(tmp_path):
    nothing = {**a_probe(), "guess": np.zeros((200, 4))}  # an oracle that has not learned yet
    write_run(tmp_path / "progress", [2, 5, 1],
              [{}, nothing, a_probe(seed=1), a_probe(units=2, seed=2)])
    done = run_plot(tmp_path)
    assert done.returncode == 0, done.stderr
    assert written(tmp_path) == ["guess_000002.png", "guess_000003.png",
                                 *(f"surface_{n:06d}.png" for n in range(4))]
    assert len(frames(tmp_path / "guesses.gif")) == 2


@pytest.mark.parametrize("size", [(9, 5), (4, 9)])
def test_each_unit_has_a_pair_of_panels_on_one_scale_with_its_cosine(size, tmp_path):
    probe = a_probe()
    probe["guess"][:, 1] = -probe["g"][:, 1]
    write_run(tmp_path / "run", [2, 5, 1], [probe])
    figure = new_figure(size)
    plot.draw_guess(figure, *read_snapshot(snapshots(tmp_path / "run")[0]))
    *panels, bar = figure.axes
    titles = [ax.get_title() for ax in panels]
    assert len(panels) == 8 and sum("cosine" in title for title in titles) == 4
    assert "cosine -1.00" in next(title for title in titles if "unit 2, cosine" in title)
    scales = {tuple(ax.collections[0].get_clim()) for ax in panels}
    (low, high), = scales
    assert low == -high and bar.get_xlabel()
    both = np.sum(probe["g"] * probe["guess"]) / np.sqrt(
        np.sum(probe["g"] ** 2) * np.sum(probe["guess"] ** 2))
    assert f"{both:.2f}" in figure.get_suptitle()


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int)


@pytest.mark.parametrize("kind", plot.KINDS)
def test_the_next_picture_takes_its_layout_from_the_first_one(kind, tmp_path):
    write_run(tmp_path / "run", [2, 5, 1], [a_probe(), a_probe(seed=1)])
    draw, size, *_ = plot.KINDS[kind]
    first, second = map(read_snapshot, snapshots(tmp_path / "run"))
    places = []
    png(draw, *first, size=size, dpi=50, places=places)
    assert np.ptp([place.x0 for place in places[:2]]) > 0.1
    again, alone = (pixels(png(draw, *second, size=size, dpi=50, places=each))
                    for each in (places, None))
    assert np.abs(again - alone).mean() < 0.1
    places[0] = places[0].translated(0.1, 0)
    assert np.abs(pixels(png(draw, *second, size=size, dpi=50, places=places)) - alone).mean() > 1


@pytest.mark.processes
def test_a_run_without_snapshots_or_cosines_is_drawn_all_the_same(tmp_path):
    progress = Progress(tmp_path / "run", ["seconds", "examples", "test_mse"], {})
    assert run_plot(tmp_path).returncode == 0  # no row yet
    progress.write(weights([2, 3, 1]), seconds=1, examples=5, test_mse=0.1)
    assert run_plot(tmp_path).returncode == 0 and written(tmp_path) == ["surface_000000.png"]


def curves(metrics):
    """The axes on which these runs are drawn, after drawing."""
    figure = new_figure((9, 6))
    plot.draw_curves(figure, metrics)
    figure.canvas.draw()
    return figure.axes


@pytest.mark.parametrize("low, high, lowest", [(0.012, 0.16, 0.01), (0.0023, 0.2, 0.002),
                                               (0.052, 0.06, 0.052)])
def test_a_curves_axis_begins_at_a_tick_unless_it_is_narrow(low, high, lowest):
    axes = new_figure((4, 3)).subplots()
    axes.set(yscale="log", ylim=(low, high))
    log_ticks(axes)
    assert axes.get_ylim() == pytest.approx((lowest, high))


def scores(*values, **more):
    steps = np.arange(len(values), dtype=float)
    return {"seconds": steps, "examples": steps, "test_mse": np.array(values), **more}


@pytest.mark.parametrize("low, high", [(0.007, 1e5), (0.021, 0.029), (0.02, 0.16), (1e-9, 1)])
def test_a_logarithmic_axis_has_labelled_ticks_over_any_range(low, high):
    ax = curves({"a run": scores(low, high)})[0]
    bottom, top = ax.get_ylim()
    labelled = [label.get_text() for label in ax.get_yticklabels()
                if label.get_text() and bottom <= label.get_position()[1] <= top]
    assert 2 <= len(labelled) <= 15 and len(set(labelled)) == len(labelled)


def test_no_two_of_many_runs_share_colour_and_style():
    assert len(set(plot.STYLES[:21])) == 21
    ax = curves({f"run {n}": scores(1, 0.1) for n in range(21)})[0]
    looks = {(line.get_color(), str(line._dash_pattern)) for line in ax.lines}
    assert len(looks) == 21


def test_the_score_of_a_constant_guess_is_a_labelled_line(tmp_path):
    write_run(tmp_path / "with", [2, 5, 1], constant_guess=0.161)
    write_run(tmp_path / "without", [2, 5, 1])
    metrics = {name: plot.read_run(tmp_path / name) for name in ("with", "without")}
    ax = curves(metrics)[0]
    line, = (line for line in ax.lines if line.get_label() == "always guessing the mean")
    assert list(line.get_ydata()) == [0.161, 0.161]
    assert [line.get_label() for line in curves({"without": metrics["without"]})[0].lines] == [
        "without"]


def test_a_folder_is_left_out_only_if_a_run_was_moved_aside_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n, name in enumerate(("lr0.5", "sgd_progress", "progress", "progress.1", "b.2")):
        write_run(tmp_path / name, [2, 3, 1], [None])
        os.utime(tmp_path / name / "metrics.csv", (n, n))
    assert plot.runs_here() == ["b.2", "progress", "sgd_progress", "lr0.5"]


@pytest.mark.processes
def test_runs_of_the_same_name_are_both_drawn_and_a_torn_newest_snapshot_is_left_out(tmp_path):
    write_run(tmp_path / "a" / "run", [2, 5, 1])
    write_run(tmp_path / "b" / "run", [2, 5, 1])
    (tmp_path / "a" / "run" / "snapshot_000002.npz").write_bytes(b"torn")
    done = run_plot(tmp_path, "a/run", "b/run")
    assert done.returncode == 0 and len(frames(tmp_path / "learning.gif")) == 2, done.stderr
    both = (tmp_path / "learning_curves.png").read_bytes()
    assert run_plot(tmp_path, "b/run").returncode == 0
    assert (tmp_path / "learning_curves.png").read_bytes() != both


@pytest.mark.processes
def test_a_snapshot_whose_layers_do_not_fit_is_left_out_with_one_line(tmp_path):
    write_run(tmp_path / "run", [2, 5, 1], [None])
    row = dict.fromkeys(["seconds", "examples", "epoch", "test_mse", "gradient_cosine"], 1)
    Progress(tmp_path / "run", list(row), {}, resume=True).write(
        [*weights([2, 5]), *weights([4, 1])], **row)
    done = run_plot(tmp_path)
    assert done.returncode == 0 and done.stderr.count("left out snapshot_000001.npz") == 1
    assert "Traceback" not in done.stderr and written(tmp_path) == ["surface_000000.png"]


@pytest.mark.processes
@pytest.mark.parametrize("dims", [[3, 4, 1], [784, 4, 10]])
def test_other_than_two_inputs_cannot_be_drawn_and_it_says_so(dims, tmp_path):
    write_run(tmp_path / "run", dims)
    done = run_plot(tmp_path, "run")
    assert done.returncode == 0 and f"over {dims[0]} input columns cannot be drawn" in done.stdout
    assert (tmp_path / "learning_curves.png").exists()
    assert not (tmp_path / "learning.gif").exists()


@pytest.mark.processes
def test_plot_without_runs_says_what_writes_them(tmp_path):
    done = run_plot(tmp_path)
    assert done.returncode == 2 and "no folder here holds a run" in done.stderr
    assert run_plot(tmp_path, "nowhere").returncode == 2
    assert run_plot(tmp_path, "--live", "--port", "65536").returncode == 2


@pytest.mark.parametrize("kind, tall", [("surface", False), ("surface", True), ("guess", True),
                                        ("curves", True)])
def test_the_live_page_draws_what_is_there_wide_or_tall(kind, tall, tmp_path):
    write_run(tmp_path / "run", [2, 5, 1], [a_probe()])
    picture = plot.draw_live(tmp_path / "run", kind, tall)
    width, height = Image.open(io.BytesIO(picture)).size
    assert (height > width) == tall


def test_before_there_is_anything_to_draw_the_live_page_says_so(tmp_path):
    for kind in ("surface", "curves"):
        assert plot.draw_live(tmp_path, kind, False).startswith(b"\x89PNG")
    assert plot.draw_live(tmp_path, "guess", False) is None


def test_a_folder_that_is_just_being_moved_has_no_version(tmp_path, monkeypatch):
    monkeypatch.setattr(live.runs, "snapshots", lambda folder: [tmp_path / "snapshot_000001.npz"])
    assert live.Pictures(None, tmp_path).version() is None


# ---- what the live page says ----

INPUT = {"process": "input trainer", "state": "training along synthetic gradients",
         "gradients": "synthetic", "examples": 500, "total": 1000}
ALL = {"input trainer": INPUT, "output trainer": {"process": "output trainer"},
       "oracle": {"process": "oracle"}}


def said(run=None, **changed):
    return live.sentence({**ALL, **{name.replace("_", " "): each
                                    for name, each in changed.items()}}, run or {})


def test_the_page_says_how_far_training_is():
    text, well = said()
    assert well and "synthetic gradients: 50% of 1,000 examples" in text
    assert said(input_trainer={**INPUT, "total": None, "examples": None})[1]
    assert said(input_trainer=None, run={"ended": "finished"}) == ("training is finished", True)
    text, well = said(input_trainer=None, run={"ended": "stopped: it diverged"})
    assert not well and "it diverged" in text
    text, well = said(input_trainer=None)
    assert not well and "input trainer does not answer" in text


def test_the_page_says_that_nothing_is_trained_and_who_is_waited_for():
    for who in ("output trainer", "oracle"):
        text, well = said(**{who: None})
        assert not well and "Nothing is trained" in text and f"waited for: {who}" in text


@pytest.mark.parametrize("gradients", ["true", "delayed"])
def test_an_oracle_that_nobody_asks_is_not_waited_for(gradients):
    statuses = {**ALL, "oracle": None, "input trainer": {**INPUT, "gradients": gradients}}
    assert live.missing(statuses) == [] and live.sentence(statuses, {})[1]
    statuses["oracle at 127.0.0.1:5011"] = None
    statuses["middle trainer at 127.0.0.1:5012"] = {"gradients": "synthetic"}
    assert live.missing(statuses) == ["oracle at 127.0.0.1:5011"]


def test_the_page_says_that_the_input_trainer_writes_to_another_folder(tmp_path):
    def line(folder):
        return live.other_folder({"input trainer": {**INPUT, "progress_dir": folder}},
                                 tmp_path / "progress")
    assert line(str(tmp_path / "progress")) is None and line(None) is None
    (tmp_path / "link").symlink_to(tmp_path / "progress")
    assert line(str(tmp_path / "link")) is None
    assert str(tmp_path / "lr1") in line(str(tmp_path / "lr1"))
    assert live.other_folder({"input trainer": None}, tmp_path) is None


def test_a_browser_is_given_an_address_that_it_can_open():
    name = socket.gethostname()
    assert live.url("0.0.0.0", 5004) == live.url("::", 5004) == f"http://{name}:5004/"
    assert live.url("::1", 80) == "http://[::1]:80/"
    assert live.url("127.0.0.1", 5004) == "http://127.0.0.1:5004/"


def test_behind_a_proxy_with_a_prefix_the_page_asks_below_that_prefix():
    """JupyterHub serves it as /user/NAME/proxy/5004/, so no URL may begin with a slash."""
    page = (ROOT / "plumbing" / "page.html").read_text(encoding="utf-8")
    asked = re.findall(r"fetch\([`'\"]([^`'\"]*)", page)
    assert asked == ["${id}${shape}.png?version=${version}", "live"]
    assert not re.search(r"(src|href)=[\"']?/", page)


@contextlib.contextmanager
def a_server(body):
    """Answers every request with 200 and these bytes; gives its address."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("body", [
    b"", b"<html>", b"\xff\xfe", b"[1, 2]", b"7", b"null", b"{}", b'{"process": 3}',
    b'{"process": "oracle"}', b'{"process": "input trainer", "loss": NaN}',
    b'{"a":' * 100_000, b'{"process": "input trainer", "x": 1e999}'], ids=lambda body: body[:40])
def test_a_server_that_answers_rubbish_is_unreachable(body):
    with a_server(body) as address:
        assert live.Process(address, None, "input trainer").ask() is None


def test_further_processes_are_named_by_what_they_say():
    body = json.dumps({"process": "middle trainer", "loss": None}).encode()
    with a_server(body) as address:
        process = live.Process(address, None)
        assert process.name == f"process at {address}"
        assert live.statuses_of([process]) == {
            f"middle trainer at {address}": {"process": "middle trainer", "loss": None}}
    assert live.statuses_of([process]) == {f"middle trainer at {address}": None}


# ---- the live page in a browser ----

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
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(tmp_path):
    """The live page's own process for three that run in tmp_path: page(three) -> its address."""
    started = []

    def serve(three, *options):
        port = free_ports(1)[0]
        servers = [f"--{who}-server=127.0.0.1:{three.port(who)}"
                   for who in ("oracle", "output", "input")]
        started.append(start("plot.py", "--live", three.progress, "--port", port, *servers,
                             *options, log=tmp_path / "page.log"))
        wait_until(lambda: f"127.0.0.1:{port}" in (tmp_path / "page.log").read_text(),
                   "the live page")
        return f"http://127.0.0.1:{port}/"
    yield serve
    assert [end(process) for process in started] == [0]
    assert "Traceback" not in (tmp_path / "page.log").read_text()


@pytest.mark.processes
def test_the_live_page_shows_a_run_that_goes_on_and_says_when_something_is_wrong(
        browser, page, tmp_path, small_data):
    endless = [*small_data, "--num-epochs", 10**6, "--snapshot-seconds", 3]
    with Three(tmp_path, input=endless) as three, a_server(b"rubbish") as rubbish:
        three.start()
        wait_until(lambda: (three.status("input") or {}).get("test_mse"), "training to start")
        browser.set_window_size(390, 844)
        browser.get(page(three, "--also", rubbish))

        def pixels(name="surface"):
            image = browser.find_element("id", name)
            loaded = "return arguments[0].complete && arguments[0].naturalWidth"
            if not browser.execute_script(loaded, image):
                return None
            shot = Image.open(io.BytesIO(image.screenshot_as_png)).convert("RGB")
            return np.asarray(shot).astype(int)

        def text():
            return browser.find_element("tag name", "body").text

        wait_until(lambda: (shot := pixels()) is not None and shot.std() > 20,
                   "a picture of the surface")
        first = pixels()
        wait_until(lambda: (shot := pixels()) is not None and shot.shape == first.shape
                   and (shot != first).any(), "the picture to change as training goes on")
        wait_until(lambda: (shot := pixels("guess")) is not None and shot.std() > 5,
                   "a picture of the guesses")
        for words in ("training along synthetic gradients", "of at most 20", "waits for gradients",
                      "examples sent", "gradient cosine", "has learned from update",
                      "minibatches skipped", f"process at {rubbish}\nunreachable"):
            assert words in text()
        fits = "return document.documentElement.scrollWidth <= window.innerWidth"
        assert browser.execute_script(fits)
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
        for act, who, names in ((three.kill, "oracle", "oracle"),
                                (three.kill, "output", "output trainer, oracle"),
                                (three.start, "output", "oracle")):
            act(who)
            said = f"Nothing is trained. Unreachable, and waited for: {names}, process at"
            wait_until(lambda said=said: said in text(), f"the page to say: {said}")
        three.kill("input")
        wait_until(lambda: "does not answer" in text(), "the page to say that the input is gone")


@pytest.mark.processes
def test_the_live_page_says_that_training_is_finished(browser, page, tmp_path, small_data):
    with Three(tmp_path, input=[*small_data, "--num-epochs", 5, "--gradients", "true"]) as three:
        three.start("output", "input")
        browser.get(page(three))
        assert three.wait_for_input(120) == 0
        wait_until(lambda: "training is finished" in browser.find_element("id", "state").text,
                   "the page to say so")
