"""`make run` and the launcher: the virtual environment, which commands it starts, and that it
leaves nobody behind."""
import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from plumbing import check_machine, launch
from plumbing.launch import STOP_SECONDS, command_lines, free_first_port, parse, widths
from plumbing.runs import read_metrics
from tests.processes import ROOT, status, wait_until


@pytest.mark.parametrize("version, machine, modules, said", [
    ((3, 10, 4), ("Linux", "x86_64"), True, None), ((3, 13), ("Darwin", "arm64"), True, None),
    ((3, 12), ("Windows", "AMD64"), True, None), ((3, 12), ("Linux", "aarch64"), True, None),
    ((3, 9), ("Linux", "x86_64"), True, "for Python 3.9, only for 3.10 to 3.13."),
    ((3, 14), ("Darwin", "arm64"), True, "make run PYTHON=python3.12"),
    ((3, 12), ("Darwin", "x86_64"), True, "for Darwin on x86_64, only for Linux on x86_64"),
    ((3, 12), ("Windows", "ARM64"), True, "for Windows on ARM64"),
    ((3, 12), ("Linux", "x86_64"), False, "sudo apt install python3.12-venv")])
def test_where_tensorflow_cannot_be_installed_one_line_says_so(version, machine, modules, said):
    line = check_machine.problem(version, machine, modules)
    assert said in line if said else line is None


FAKE_PYTHON = """#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in
  plumbing/*) exit $UNFIT ;;
  "-m venv"*) for venv; do :; done; mkdir -p "$venv/bin"; ln -sf "$0" "$venv/bin/python"
              touch "$venv/pyvenv.cfg" ;;
  *msgspec*) test -e "$PACKAGES" ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """make(unfit=0) makes tmp_path/venv with a Python that only notes down how it is called."""
    (fake := tmp_path / "fake").write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    (log := tmp_path / "log").touch()
    (tmp_path / "packages").touch()

    def make(unfit=0):
        log.write_text("")
        done = subprocess.run(
            ["make", f"PYTHON={fake}", f"VENV={tmp_path}/venv", f"{tmp_path}/venv/ready"], cwd=ROOT,
            env={**os.environ, "LOG": str(log), "UNFIT": str(unfit),
                 "PACKAGES": str(tmp_path / "packages")}, capture_output=True)
        lines = log.read_text().splitlines()
        return done.returncode, [line for line in lines if not line.startswith("-c")]
    return make


def test_the_machine_is_checked_before_anything_is_made_or_downloaded(make, tmp_path):
    assert make(unfit=2) == (2, ["plumbing/check_machine.py"])
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("broken", ["venv/bin/python", "packages"])
def test_an_environment_is_made_once_and_again_when_its_python_has_gone(broken, make, tmp_path):
    _, [_, made, installed] = make()
    assert made == f"-m venv {tmp_path}/venv" and "pip install" in installed
    assert make() == (0, [])
    (tmp_path / broken).unlink()
    if broken != "packages":
        (tmp_path / broken).symlink_to(tmp_path / "no_such_python")
    code, lines = make()
    assert code == 0 and lines[1] == f"-m venv --clear {tmp_path}/venv" and len(lines) == 3


def composed(*argv):
    """{name: command} as one string each."""
    commands = command_lines(parse(["x.npy", "y.npy", *argv]))
    return {name: " ".join(words) for name, words in commands.items()}


PAGE = ("plot.py --port 5004 --live progress --oracle-server 127.0.0.1:5001 "
        "--output-server 127.0.0.1:5002 --input-server 127.0.0.1:5003")


def input_trainer(gradients, above=5002):
    return ("train_input.py --port 5003 --layers 2 24 --oracle-server 127.0.0.1:5001 "
            f"--output-server 127.0.0.1:{above} --progress-dir progress --gradients {gradients} "
            "--seed 0 x.npy y.npy")


def output_trainer(layers, back):
    """back: where its gradients go."""
    return (f"train_output.py --port 5002 --layers {layers} --oracle-server {back} "
            "--progress-dir output_progress --seed 0")


def test_the_default_is_what_four_terminals_start():
    assert composed() == {
        "oracle1": "oracle.py --port 5001 --layers 24 64 64 24 --seed 0",
        "output": output_trainer("24 12 1", "127.0.0.1:5001"), "page": PAGE,
        "input": input_trainer("synthetic")}


def test_shuffled_guesses_need_the_same_processes_as_guesses():
    assert list(composed("--gradients", "shuffled")) == list(composed())


@pytest.mark.parametrize("gradients, back", [
    ("true", "none"), ("local", "none"), ("zero", "none"), ("delayed", "127.0.0.1:5003")])
def test_other_gradients_need_no_oracle_and_only_delayed_ones_go_back(gradients, back):
    assert composed("--gradients", gradients) == {
        "output": output_trainer("24 12 1", back), "page": PAGE, "input": input_trainer(gradients)}


def middle_trainer(k, layers, back, above, gradients="synthetic"):
    port = 5010 + 2 * k
    return (f"train_middle.py --port {port} --layers {layers} --lower-oracle-server "
            f"{back} --oracle-server 127.0.0.1:{port + 1} --output-server "
            f"127.0.0.1:{above} --progress-dir middle{k}_progress --gradients {gradients} --seed 0")


FOUR = "--parts", "2-24", "24-12", "12-8", "8-1"


def test_a_chain_of_four_parts_has_three_oracles_that_see_labels():
    assert composed(*FOUR) == {
        "oracle1": "oracle.py --port 5001 --layers 24 64 64 24 --condition-on-labels 1 --seed 0",
        "oracle2": "oracle.py --port 5013 --layers 12 64 64 12 --condition-on-labels 1 --seed 0",
        "oracle3": "oracle.py --port 5015 --layers 8 64 64 8 --condition-on-labels 1 --seed 0",
        "output": output_trainer("8 1", "127.0.0.1:5015"),
        "middle1": middle_trainer(1, "24 12", "127.0.0.1:5001", 5014),
        "middle2": middle_trainer(2, "12 8", "127.0.0.1:5013", 5002),
        "page": f"{PAGE} --also 127.0.0.1:5013 127.0.0.1:5015 127.0.0.1:5012 127.0.0.1:5014",
        "input": input_trainer("synthetic", above=5012)}


@pytest.mark.parametrize("gradients", ["true", "local", "zero", "delayed"])
def test_every_part_of_a_chain_but_the_highest_has_the_same_gradients(gradients):
    back = ([f"127.0.0.1:{port}" for port in (5003, 5012, 5014)] if gradients == "delayed"
            else ["none"] * 3)  # delayed ones go to the part below
    assert composed(*FOUR, "--gradients", gradients) == {
        "output": output_trainer("8 1", back[2]),
        "middle1": middle_trainer(1, "24 12", back[0], 5014, gradients),
        "middle2": middle_trainer(2, "12 8", back[1], 5002, gradients),
        "page": f"{PAGE} --also 127.0.0.1:5012 127.0.0.1:5014",
        "input": input_trainer(gradients, above=5012)}


def test_each_option_goes_to_the_processes_that_have_it():
    commands = composed(
        "--parts", "784-256", "256-256", "256-10", "--oracle-layers", "--seed", "7", "--resume",
        "--progress-dir", "runs/deep", "--token-file", "secret", "--port", "6000", "--first-port",
        "6001", "--batch-size", "50", "--staleness", "9", "--learning-rate", "0.3", "--head",
        "--head-rate", "0.2", "--held-out", "10000", "--allow-host", "hub", "--allow-host",
        "hub.example")
    for name, command in commands.items():
        assert "--token-file secret" in command
        assert "--allow-host hub --allow-host hub.example" in command
        assert ("--seed 7" in command) == (name != "page")
        assert ("--resume" in command) == (name in ("input", "middle1", "output"))
        assert ("--batch-size 50" in command) == (name in ("input", "middle1", "output"))
        assert ("--staleness 9 --learning-rate 0.3 --head --head-rate 0.2" in command) == (
            name in ("input", "middle1"))
    assert commands["oracle1"].startswith(
        "oracle.py --port 6001 --layers 256 256 --condition-on-labels 10 ")
    assert "--progress-dir runs/output_deep " in commands["output"]
    assert "--progress-dir runs/middle1_deep " in commands["middle1"]
    assert commands["input"].endswith("x.npy y.npy --held-out 10000")
    assert " --port 6000 " in commands["input"]
    assert "--input-server 127.0.0.1:6000" in commands["page"]


@pytest.mark.parametrize("given, wanted", [
    ([], None), (["--condition-on-labels"], 1), (["--condition-on-labels", "3"], 3),
    ([*FOUR, "--condition-on-labels", "0"], None)])
def test_oracles_see_labels_where_asked_to(given, wanted):
    oracle = composed(*given)["oracle1"]
    assert (f"--condition-on-labels {wanted}" if wanted else "24 --seed") in oracle
    assert ("--condition-on-labels" in oracle) == bool(wanted)


@pytest.mark.parametrize("given, said", [
    (["2-24", "24-12", "10-1"], "--parts 24-12 10-1: a part begins with the width that the part "
                                "below it ends with: 24-12 12-1"),
    (["2-24-1"], "--parts takes two or more parts, like 2-24 24-12-1"),
    (["2-24", "24"], "24: expected widths like 24-12"),
    (["2-0", "0-1"], "2-0: expected widths like 24-12")])
def test_parts_that_do_not_fit_are_one_clear_error(given, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["x.npy", "y.npy", "--parts", *given])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(said)


def test_widths_are_numbers_joined_by_hyphens():
    assert widths("24-12-1") == [24, 12, 1]


class Launched:
    """A launcher on ports of its own, what it prints, and the processes that it started."""

    def __init__(self, folder, *options):
        self.first, self.log = free_first_port(), folder / "log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "plumbing.launch", *map(str, options), "--first-port",
                 str(self.first), "--progress-dir", str(folder / "progress")],
                cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def started(self):
        """{script: process} of what listens on its ports, or will: whoever its parent is now."""
        found = {}
        for each in psutil.process_iter(["cmdline"]):
            _, script, *words = [*(each.info["cmdline"] or []), "", ""]
            if words[:1] == ["--port"] and int(words[1]) in range(self.first, self.first + 40):
                found[script] = each
        return found

    def wait_for_training(self):
        def training():
            assert self.process.poll() is None, self.log.read_text()
            return (status(self.first + 2) or {}).get("updates")
        wait_until(training, "training")

    def end(self, seconds=STOP_SECONDS - 5):
        """Its exit code; nobody may be left. By default sooner than it would kill anybody."""
        code = self.process.wait(seconds)
        assert not self.started()
        return code

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        for each in self.started().values():
            each.kill()


QUICK = "--gradients", "true"  # without TensorFlow, which takes long to start
ENDLESS = *QUICK, "--num-epochs", 10**6


@pytest.mark.processes
def test_nobody_is_left_behind_when_a_run_ends(tmp_path, small_data):
    with Launched(tmp_path, *small_data, "--num-epochs", 10) as launched:
        launched.wait_for_training()
        assert {"oracle.py", "train_output.py", "train_input.py"} <= set(launched.started())
        assert launched.end(60) == 0
    assert '"ended": "finished"' in (tmp_path / "progress" / "run.json").read_text()


@pytest.mark.processes
@pytest.mark.parametrize("gradients", ["local", "delayed", "true"])
def test_a_chain_of_three_parts_learns_without_an_oracle(gradients, tmp_path, small_data):
    with Launched(tmp_path, *small_data, "--gradients", gradients, "--parts", "2-24", "24-12",
                  "12-1", "--num-epochs", 20) as launched:
        launched.wait_for_training()
        assert set(launched.started()) == {"train_output.py", "train_middle.py", "train_input.py",
                                           "plot.py"}
        assert launched.end(60) == 0
    reached = read_metrics(tmp_path / "progress")["test_mse"]
    assert reached[-1] < 0.7 * reached[0], reached


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_with_a_last_snapshot(number, tmp_path, small_data):
    with Launched(tmp_path, *small_data, *ENDLESS) as launched:
        launched.wait_for_training()
        launched.process.send_signal(number)
        assert launched.end() == 130
    rows = (tmp_path / "progress" / "metrics.csv").read_text().splitlines()
    assert len(rows) >= 3 and rows[-1].split(",")[1] != "0", launched.log.read_text()
    assert '"ended": "stopped"' in (tmp_path / "progress" / "run.json").read_text()


def test_after_nohup_a_terminal_that_closes_does_not_end_the_run():
    before = {number: signal.getsignal(number)
              for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        caught = launch.catch_signals()
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        assert caught == [signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.processes
def test_a_second_interrupt_does_not_wait_for_the_last_snapshot(tmp_path, small_data):
    with Launched(tmp_path, *small_data, *ENDLESS) as launched:
        launched.wait_for_training()
        trainer = launched.started()["train_input.py"]
        trainer.suspend()  # so that only the second Ctrl-C can end the wait
        launched.process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            launched.process.wait(2)
        assert "train_output.py" in launched.started()
        launched.process.send_signal(signal.SIGINT)
        wait_until(lambda: "train_output.py" not in launched.started(), "the others to end", 20)
        trainer.resume()
        assert launched.end() == 130


@pytest.mark.processes
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("script", ["oracle.py", "train_output.py", "train_input.py"])
def test_an_interrupt_during_the_start_leaves_nobody_behind(script, count, tmp_path, small_data):
    with Launched(tmp_path, *small_data, "--num-epochs", 10**6) as launched:
        wait_until(lambda: script in launched.started(), script, pause=0)
        for _ in range(count):
            launched.process.send_signal(signal.SIGINT)
        assert launched.end() == 130


@pytest.mark.processes
@pytest.mark.parametrize("script", ["oracle.py", "train_output.py", "train_input.py"])
def test_a_child_that_dies_ends_the_launcher(script, tmp_path, small_data):
    options = [] if script == "oracle.py" else QUICK
    with Launched(tmp_path, *small_data, *options, "--num-epochs", 10**6) as launched:
        wait_until(lambda: script in launched.started(), script)
        launched.started()[script].kill()
        assert launched.end() == (2 if script != "train_input.py" else -signal.SIGKILL % 256)
    if script != "train_input.py":
        assert f"{script} was ended by SIGKILL (somebody" in launched.log.read_text()


@pytest.mark.parametrize("code, said", [
    (2, "ended with exit code 2"), (-signal.SIGTERM, "was ended by SIGTERM"),
    (-signal.SIGILL, "was ended by SIGILL (the processor lacks instructions that TensorFlow is "
                     "compiled for, such as AVX)"), (-99, "was ended by signal 99")])
def test_how_a_process_has_ended_is_said_in_words(code, said):
    assert launch.ending(code) == said


@pytest.mark.processes
def test_nobody_is_left_when_the_launcher_is_killed(tmp_path, small_data):
    with Launched(tmp_path, *small_data, *ENDLESS) as launched:
        launched.wait_for_training()
        launched.process.kill()
        wait_until(lambda: not launched.started(), "the processes to end", 20)


@pytest.mark.processes
def test_a_program_ends_when_the_process_that_started_it_holds_its_pipe_no_longer(tmp_path):
    (script := tmp_path / "script.py").write_text(
        "import plumbing, signal\nsignal.alarm(60)\nprint('ready', flush=True)\nsignal.pause()")
    program = launch.start([str(script)], stdout=subprocess.PIPE, cwd=ROOT,
                           env={**os.environ, "PYTHONPATH": str(ROOT), "END_WITH_PARENT": "1"})
    assert program.stdout.readline() == b"ready\n"
    program.stdin.close()
    assert program.wait(20) == 1
    program.stdout.close()


@pytest.mark.processes
def test_a_process_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "STOP_SECONDS", 1)
    ready, first, commands = tmp_path / "ready", free_first_port(), {}
    os.mkfifo(ready)  # opening it waits until the other one opens it, too
    for name, code in (
            ("oracle1", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
                        f"open({str(ready)!r}, 'w')\nsignal.pause()"),
            ("input", f"open({str(ready)!r})")):
        script = tmp_path / f"{name}.py"
        script.write_text(f"import signal\nsignal.alarm(60)\n{code}\n")
        commands[name] = [str(script), "--port", str(first + len(commands))]
    assert launch.run(commands, signals=[]) == 0
    assert not any(str(tmp_path) in " ".join(each.info["cmdline"] or [])
                   for each in psutil.process_iter(["cmdline"]))


@pytest.mark.processes
def test_a_port_that_is_taken_is_one_clear_line(small_data):
    first = free_first_port()
    with socket.create_server(("127.0.0.1", first + 1)):
        again = subprocess.run(
            [sys.executable, "-m", "plumbing.launch", *map(str, small_data), "--first-port",
             str(first)], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 1
    assert f"port {first + 1}, for train_output.py, is taken. Another program" in again.stderr
    assert "--first-port 6001 --progress-dir second" in again.stderr
