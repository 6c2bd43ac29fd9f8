"""`make run`: the same commands that people type in four terminals, each in a session of its own, as terminals have.

    python -m plumbing.launch x.npy y.npy --num-epochs 16    # what train_input.py takes

Ends when the input trainer does; Ctrl-C goes to that first, so that the others are still there for its last snapshot.
"""
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
    except KeyboardInterrupt:
        started[-1].send_signal(signal.SIGINT)
        started[-1].wait(20)
    finally:
        for process in reversed(started):
            process.terminate()
    sys.exit(max(process.wait() for process in reversed(started)))


if __name__ == "__main__":
    main()
