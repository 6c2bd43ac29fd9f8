"""`make run`: the same commands that people type in four terminals, each in a session of its own, as terminals have.

    python -m plumbing.launch x.npy y.npy --num-epochs 16    # what train_input.py takes

Ends when the input trainer does; Ctrl-C goes to that first, so that the others are still there for its last snapshot.
"""
import contextlib
import signal
import subprocess
import sys
import time

OTHERS = ["oracle.py"], ["train_output.py"], ["plot.py", "--live"]


def main():
    def interrupt(*_):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, interrupt)
    started = []
    try:
        for command in (*OTHERS, ["train_input.py", *sys.argv[1:]]):
            started.append(subprocess.Popen([sys.executable, *command], start_new_session=True))
        *others, trainer = started
        while trainer.poll() is None and all(other.poll() is None for other in others):
            time.sleep(0.2)
        code = 2 if trainer.poll() is None else trainer.poll()  # 2: another one has ended; its last line says why
    except KeyboardInterrupt:
        code = 130
        if len(started) > len(OTHERS):
            started[-1].send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                started[-1].wait(30)
    for process in reversed(started):
        process.terminate()
    for process in started:
        process.wait()
    sys.exit(code)


if __name__ == "__main__":
    main()
