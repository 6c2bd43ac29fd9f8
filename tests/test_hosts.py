"""The three processes on three hosts: network namespaces on one switch, each with an address of its
own."""
import os
import shutil
import signal
import subprocess

import pytest

from plumbing.runs import read_snapshot, snapshots
from tests.processes import end, start, wait_until

pytestmark = pytest.mark.processes
ADDRESSES = {"oracle": "10.93.0.1", "output": "10.93.0.2", "input": "10.93.0.3"}


def ip(*words):
    """`ip WORDS`; skips the test where this isn't permitted."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        command = " ".join(words)
        pytest.skip(f"needs network namespaces: ip {command}: {done.stderr.strip()}")


@pytest.fixture
def hosts(request, tmp_path):
    """Namespaces named after the processes, {process: namespace}, joined by a switch with
    (delay, loss)."""
    if not shutil.which("ip"):
        pytest.skip("needs ip, from the package iproute2")
    names = {who: f"sg-{who}-{os.getpid()}" for who in ADDRESSES}
    switch, running = f"sg-switch-{os.getpid()}", None
    try:
        ip("netns", "add", switch)
        for who, name in names.items():
            ip("netns", "add", name)
            ip("-n", switch, "link", "add", who, "type", "veth", "peer", "name", "eth0", "netns",
               name)
            ip("-n", switch, "link", "set", who, "up")
            ip("-n", name, "address", "add", f"{ADDRESSES[who]}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        running = start("tests/switch.py", *request.param, *names, log=tmp_path / "switch",
                        prefix=["ip", "netns", "exec", switch])
        yield names
        assert running.poll() is None, (tmp_path / "switch").read_text()
    finally:
        if running:
            end(running)
        for name in (*names.values(), switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.parametrize("hosts", [(0.02, 0.01)], ids=["20 ms and 1% loss"], indirect=True)
def test_three_hosts_train_one_network(hosts, tmp_path, small_data):
    (tmp_path / "token").write_text("s3cret\n")
    oracle, output = (["--oracle-server", f"{ADDRESSES['oracle']}:5001"],
                      ["--output-server", f"{ADDRESSES['output']}:5002"])
    commands = {
        "oracle": ["oracle.py"],
        "output": ["train_output.py", *oracle, "--progress-dir", tmp_path / "output_progress"],
        "input": ["train_input.py", *small_data, *oracle, *output, "--num-epochs", 1,
                  "--progress-dir", tmp_path / "progress"]}
    processes = {}
    try:
        for who, command in commands.items():
            processes[who] = start(*command, "--host", ADDRESSES[who], "--token-file",
                                   tmp_path / "token", log=tmp_path / who,
                                   prefix=["ip", "netns", "exec", hosts[who]])
        wait_until(lambda: processes["input"].poll() is not None, "the run to end", 200)
        assert processes["input"].returncode == 0, (tmp_path / "input").read_text()
    finally:
        codes = [end(process, signal.SIGTERM) for process in processes.values()]
    assert codes == [0, 0, 0]
    _, row, _ = read_snapshot(snapshots(tmp_path / "progress")[-1])
    assert row["examples"] == 3800
    assert row["seconds"] > 1.5  # 38 questions, whose answers are 40 ms away
