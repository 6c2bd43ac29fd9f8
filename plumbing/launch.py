"""`make run`: the same commands that people type in four terminals, each in a session of its own, as terminals have.

    python -m plumbing.launch x.npy y.npy --num-epochs 16    # what train_input.py takes

Ends when one of the three does; Ctrl-C goes to the input trainer first, so that the others are still there for its last
snapshot. Whatever happens, nobody is left behind.
"""
import argparse
import contextlib
import signal
import subprocess
import sys
import time


def main():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # of all options, those that others need, too
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--progress-dir", default="progress")
    parser.add_argument("--token-file")
    shared = parser.parse_known_args()[0]
    token = ["--token-file", shared.token_file] if shared.token_file else []
    commands = [["oracle.py", *token], ["train_output.py", *token, *["--resume"] * shared.resume],
                ["plot.py", "--live", shared.progress_dir, *token], ["train_input.py", *sys.argv[1:]]]
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
