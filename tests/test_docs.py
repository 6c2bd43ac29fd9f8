"""What README.md and docs/ say can be followed: links lead somewhere, commands and options exist.

Only complete commands are checked: `python X.py ...`, `python -m X ...` and `make TARGET ...`, in
code blocks and in backticks. Options that stand alone in backticks must be some program's.
"""
import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from plumbing import launch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "tests" / "benchmarks" / "README.md",
         *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = [path.name for path in sorted(ROOT.glob("*.py"))] + ["examples/in_process.py"]
LAUNCHED = "run", "chain", "try", "timeline"  # targets and modules that take the launcher's options
AS_LAUNCH = ("plumbing.launch", "plumbing.timeline", "plumbing.experiments",
             "examples/on_ray.py")      # the last one needs Ray even to say what it takes
OPTION = re.compile(r"--[a-z][a-z-]*")


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


# ---- what exists ----


@functools.cache
def options_of(program):
    """The options in a program's --help. program: oracle.py, or tests.benchmarks.bench."""
    if program in AS_LAUNCH:  # what the launcher does not know goes to train_input.py
        return options_of("train_input.py") | options_in(lambda: launch.parse(["--help"]))
    kept = sys.argv
    try:
        sys.argv = [program, "--help"]
        if program.endswith(".py"):
            return options_in(lambda: runpy.run_path(str(ROOT / program), run_name="__main__"))
        return options_in(lambda: runpy.run_module(program, run_name="__main__"))
    finally:
        sys.argv = kept


def options_in(ask_for_help):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        ask_for_help()
    return set(re.findall(rf"^ +(?:-\w, )?({OPTION.pattern})", printed.getvalue(), re.MULTILINE))


@functools.cache
def makefile():
    """{target: the module that gets ARGS, or None}, and the names of the variables."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    targets = dict.fromkeys(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE))
    targets |= {name: "plumbing.launch" for name in LAUNCHED if name in targets}
    targets |= {name: f"tests.benchmarks.{name.replace('-', '_')}"
                for name in re.search(r"^BENCHES = (.*)", text, re.MULTILINE)[1].split()}
    return targets, {"ARGS", *re.findall(r"^(\w+) \?=", text, re.MULTILINE)}


@functools.cache
def all_options():
    """Of all programs and benchmarks."""
    programs = [*PROGRAMS, "plumbing.launch", *filter(None, makefile()[0].values())]
    return set().union(*map(options_of, programs))


# ---- what a page says ----


def code_and_prose(text):
    """The lines of code blocks, and the rest, in which code is in backticks."""
    code, prose, fence = [], [], False
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            fence = not fence
        elif fence or line.startswith("    "):
            code.append(line)
        else:
            prose.append(line)
    return re.sub(r"\\\n\s*", "", "\n".join(code)).split("\n"), "\n".join(prose)


def words_of(line):
    try:
        return shlex.split(line)
    except ValueError:
        return []  # half of a quotation: no command


def commands(text):
    """Yields the words of each command, without python: ["oracle.py", "--layers", ...]."""
    code, prose = code_and_prose(text)
    inline = [" ".join(each.split()) for each in re.findall(r"`([^`]+)`", prose)]
    lines = [re.sub(r"(^|\s)#.*", "", line) for line in code] + inline
    for part in re.split(r"&&|;|\n", "\n".join(lines)):
        words = words_of(part.strip().removeprefix("$ "))
        if words and re.fullmatch(r"(\S*/)?python3?", words[0]):
            words = words[2:] if words[1:2] == ["-m"] else words[1:]
            if words and (words[0].endswith(".py") or "." in words[0]):
                yield words
        elif words and (words[0] == "make" and len(words) > 1
                        or words[0].endswith(".py") and len(words) > 1):
            yield words


def problems_of_command(words):
    """A list of what is wrong with a command."""
    program, *rest = words
    if program == "make":
        targets, variables = makefile()
        wanted = [word for word in rest if "=" not in word]
        values = dict(word.split("=", 1) for word in rest if "=" in word)
        unknown = [name for name in wanted if name not in targets]
        unknown += [name for name in values if name not in variables]
        if unknown:
            return [f"make has no {name}" for name in unknown]
        program, rest = targets[wanted[0]] if wanted else None, words_of(values.get("ARGS", ""))
        if program is None:
            return [f"{' '.join(words)}: takes no ARGS"] if rest else []
    elif program.endswith(".py"):
        if not (ROOT / program).exists():
            return [f"there is no {program}"]
    elif not (ROOT / f"{program.replace('.', '/')}.py").exists():
        return [f"there is no module {program}"]
    given = [match[0] for word in rest if (match := OPTION.match(word))]
    unknown = [option for option in given if option not in options_of(program)]
    return [f"{program} has no {option}" for option in unknown if option != "--help"]


def problems_of_commands(text):
    found = [problem for words in commands(text) for problem in problems_of_command(words)]
    alone = {option for span in re.findall(r"`([^`]+)`", code_and_prose(text)[1])
             if re.match(r"--|ARGS=", span) for option in OPTION.findall(span)}
    return found + [f"no program has {option}" for option in sorted(
        alone - {"--help"} - all_options())] if alone else found


def anchors(text):
    """Of headings, as GitHub makes them, and of HTML."""
    found = []
    prose = code_and_prose(text)[1]
    for heading in re.findall(r"^#+ +(.*)", prose, re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.append(re.sub(r"[^\w\- ]", "", heading).replace(" ", "-"))
    numbered = {f"{name}-{n}" for name in found for n in range(1, found.count(name))}
    return {*found, *numbered, *re.findall(r'(?:id|name)="([^"]+)"', prose)}


def problems_of_links(text, folder):
    """folder: where the page is."""
    prose = re.sub(r"`[^`]*`", "", code_and_prose(text)[1])
    links = (re.findall(r"\]\(\s*<?([^)\s>]+)", prose)
             + re.findall(r'(?:src|href)="([^"]+)"', prose)
             + re.findall(r"^\[[^\]]+\]: *(\S+)", prose, re.MULTILINE))
    problems = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        path = folder / name
        if name and not path.exists():
            problems.append(f"{link}: there is no such file")
        elif anchor and (not name or path.suffix == ".md"):
            target = path.read_text(encoding="utf-8") if name else text
            if anchor not in anchors(target):
                problems.append(f"{link}: there is no such heading")
    return problems


# ---- the tests ----


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_to_files_and_headings(page):
    assert problems_of_links(page.read_text(encoding="utf-8"), page.parent) == []


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_commands_and_options_exist(page):
    assert problems_of_commands(page.read_text(encoding="utf-8")) == []


def test_the_readme_has_at_most_1400_words():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1400


def test_names_in_the_page_about_the_paper_exist():
    """`file.py`: `name`, `name` in docs/paper.md."""
    text = " ".join((ROOT / "docs" / "paper.md").read_text(encoding="utf-8").split())
    said = re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, | and )?)+)", text)
    assert len(said) > 10
    for file, names in said:
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            for part in name.split("."):
                assert re.search(rf"\b(def|class) {part}\b", source), f"{file} has no {name}"


@pytest.mark.parametrize("text, problem", [
    ("[x](docs/nothing.md)", "docs/nothing.md: there is no such file"),
    ("![x](images/nothing.png)", "images/nothing.png: there is no such file"),
    ("# A heading\n[x](#another-heading)", "#another-heading: there is no such heading"),
    ("[x](README.md#no-such-heading)", "README.md#no-such-heading: there is no such heading"),
], ids=["file", "image", "anchor", "anchor elsewhere"])
def test_a_broken_link_is_found(text, problem):
    assert problems_of_links(text, ROOT) == [problem]


def test_links_that_are_right_are_no_problem():
    text = "# What's `new`? A heading\n[x](#whats-new-a-heading) [y](Makefile) [z](https://a.b/c)"
    assert problems_of_links(text, ROOT) == []


@pytest.mark.parametrize("text, problem", [
    ("    python oracle.py --layer 24 24", "oracle.py has no --layer"),
    ("```\npython sgd.py x.npy \\\n  y.npy --warm-up 3\n```", "sgd.py has no --warm-up"),
    ("Type `python nothing.py` now", "there is no nothing.py"),
    ("Type `oracle.py --nothing\n3`", "oracle.py has no --nothing"),
    ("    python -m plumbing.nothing x.npy", "there is no module plumbing.nothing"),
    ("    make nothing", "make has no nothing"),
    ("    make run EPOCH=3", "make has no EPOCH"),
    ('    make run ARGS="--gradients true --nothing 3"', "plumbing.launch has no --nothing"),
    ('    make chain ARGS="--delay 3"', "plumbing.launch has no --delay"),
    ("`make bench ARGS='--nothing'`", "tests.benchmarks.bench has no --nothing"),
    ('    make clean ARGS="--resume"', "make clean ARGS=--resume: takes no ARGS"),
    ("Give `--nothing 3` to it", "no program has --nothing"),
], ids=lambda each: each.split("\n")[0].strip())
def test_a_wrong_command_is_found(text, problem):
    assert problems_of_commands(text) == [problem]
