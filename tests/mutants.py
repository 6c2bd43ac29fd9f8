"""`make mutants`: changes the code in small ways, one at a time, and prints what no fast test
notices.

    python -m tests.mutants                # sgd.py, exchange.py, links.py, synthgrad.py, loops
    python -m tests.mutants 'exchange.*'   # names of mutmut's, with * for anything

mutmut (https://mutmut.readthedocs.io) makes the changes, in the folder mutants/. What it changes
and with which tests it tries stands in pyproject.toml. Of the trainers only what is named in LOOPS
counts: the rest of them is plumbing, which the tests with processes cover.
"""
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

LOOPS = ["sgd.*", "exchange.*", "links.*", "synthgrad.*", "train_input.x_train__*",
         "train_input.x_mean_cosine__*", "train_middle.x_train__*", "train_output.x_train__*"]
NOT_ALGORITHM = r"sgd\.x_main__"  # the command line


def mutmut(*args, **options):
    command = [Path(sys.executable).with_name("mutmut"), *args]
    return subprocess.run(command, text=True, **options)


def main():
    names = sys.argv[1:] or LOOPS
    done = mutmut("run", "--max-children", str(os.cpu_count()), *names)
    if done.returncode:
        sys.exit(done.returncode)
    listed = mutmut("results", "--all", "true", capture_output=True).stdout
    found = dict(re.findall(r"^\s*(\S+__mutmut_\d+): (.+)$", listed, re.MULTILINE))
    patterns = [name.replace(".", r"\.").replace("*", ".*") for name in names]
    verdicts = {name: verdict for name, verdict in found.items()
                if any(re.match(pattern, name) for pattern in patterns)
                and not re.match(NOT_ALGORITHM, name)}
    survivors = [name for name, verdict in verdicts.items()
                 if verdict in ("survived", "no tests", "suspicious")]
    for name in survivors:
        shown = mutmut("show", name, capture_output=True).stdout
        changed = [line for line in shown.splitlines() if re.match(r"[-+](?![-+])", line)]
        print(f"\n{name}: {verdicts[name]}", *changed, sep="\n")
    counts = ", ".join(f"{count} {verdict}" for verdict, count in Counter(
        verdicts.values()).most_common())
    print(f"\n{len(verdicts)} mutants: {counts}. "
          f"{len(survivors) / max(1, len(verdicts)):.0%} survive")


if __name__ == "__main__":
    main()
