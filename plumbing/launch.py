"""`make run`: the same commands that people type in four terminals, each in a session of its own,
as terminals have.

    python -m plumbing.launch x.npy y.npy --num-epochs 16    # what train_input.py takes

Ends when one of the three does; Ctrl-C goes to the input trainer first, so that the others are
still there for its last snapshot. Whatever happens, nobody is left behind.
"""
import argparse
import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # of all options, those that others need, too
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--progress-dir", type=Path, default="progress")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--port", default="5003")
    parser.add_argument("--token-file")
    shared = parser.parse_known_args()[0]
    folder, seed = shared.progress_dir, ["--seed", shared.seed]
    token = ["--token-file", shared.token_file] if shared.token_file else []
    commands = [["oracle.py", *seed, *token],
                ["train_output.py", "--progress-dir", folder.parent / f"output_{folder.name}", *seed, *token,
                 *["--resume"] * shared.resume],
                ["plot.py", "--live", folder, "--input-server", f"127.0.0.1:{shared.port}", *token],
                ["train_input.py", *sys.argv[1:]]]
    for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):
        signal.signal(getattr(signal, name), signal.default_int_handler)
    started = []
    try:
        for command in commands:
            started.append(subprocess.Popen([sys.executable, *command], start_new_session=True))
        oracle, output, page, trainer = started
        while all(process.poll() is None for process in (oracle, output, trainer)):
            time.sleep(0.2)
        code = 2 if trainer.poll() is None else trainer.poll()  # 2: another one has ended; its last line says why
    except KeyboardInterrupt:
        code = 130
        if len(started) == len(commands):
            started[-1].send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                started[-1].wait(30)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait()
    sys.exit(code)


if __name__ == "__main__":
    main()
