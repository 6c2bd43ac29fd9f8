"""Says in one line, before anything is downloaded, why TensorFlow cannot be installed here.

    python3 plumbing/check_machine.py

The Makefile runs this with the Python that will make the virtual environment. That may be an old
one, so this file imports nothing of the project and is written for Python 2 as well.
"""
import platform
import sys

FIRST, LAST = (3, 10), (3, 13)  # of the Pythons that wheels of TensorFlow 2.18 to 2.21 are for
MACHINES = (("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64"), ("Windows", "AMD64"))


def problem(version, machine, modules):
    """The line, or None. version: like (3, 12); machine: like ("Linux", "x86_64"); modules: whether
    Python can make a virtual environment."""
    if machine not in MACHINES:
        return ("there is no TensorFlow for {} on {}, only for Linux on x86_64 or aarch64, macOS "
                "on arm64 and Windows on x86_64. Use such a machine".format(*machine))
    if not FIRST <= version[:2] <= LAST:
        return ("there is no TensorFlow for Python {}.{}, only for 3.10 to 3.13. Install one of "
                "these and name it: make run PYTHON=python3.12".format(*version))
    if not modules:
        return ("this Python cannot make a virtual environment, because ensurepip is missing. On "
                "Debian and Ubuntu: sudo apt install python{}.{}-venv".format(*version))
    return None


def main():
    """Exit code 2 and the line, or nothing."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
        modules = True
    except ImportError:
        modules = False
    line = problem(tuple(sys.version_info), (platform.system(), platform.machine()), modules)
    if line:
        sys.stderr.write(": ".join((sys.executable, line)) + "\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
