"""x.npy and y.npy as people bring them: what is taken, what is refused, and with which cure."""
import io
import sys
import types

import numpy as np
import pytest

import sgd
import generate
from generate import digits, sample
from plumbing import data
from plumbing.errors import FileError, UserError
from tests.conftest import save
from tests.processes import start

N = 400
X, Y = sample(N, seed=0)
LABELS = np.arange(N) % 3


def load(folder, x=X, y=Y, held_out=None):
    return data.load(*save(folder, x, y), held_out)


def test_the_last_examples_are_held_out_in_their_order(tmp_path):
    x, y = np.arange(80.0).reshape(40, 2), np.arange(40.0)
    for held_out, expected in ((None, 2), (7, 7)):
        loaded = load(tmp_path, x, y, held_out)
        assert loaded.y.shape == (40 - expected, 1)
        assert list(loaded.y_test[:, 0]) == list(range(40 - expected, 40))
        np.testing.assert_array_equal(np.concatenate([loaded.x, loaded.x_test]), x)
        assert {each.dtype for each in loaded} == {np.dtype("float32")}


def test_integers_are_classes_and_become_one_hot(tmp_path):
    loaded = load(tmp_path, y=LABELS)
    y = np.concatenate([loaded.y, loaded.y_test])
    assert y.shape == (N, 3) and (y.argmax(axis=1) == LABELS).all() and (y.sum(axis=1) == 1).all()
    assert sgd.task_of(loaded.y.shape[1]).score == "test_error"


def test_a_column_of_targets_is_taken_as_what_most_tools_write(tmp_path):
    for y in (Y, LABELS):
        column, plain = load(tmp_path, y=y[:, None]), load(tmp_path, y=y)
        assert all((mine == theirs).all() for mine, theirs in zip(column, plain, strict=True))


@pytest.mark.parametrize("y", [LABELS + 1, np.array([0, 5, 9])[LABELS], 2 * (np.arange(N) % 2) - 1,
                               np.arange(N) % 322 + 25, np.zeros(N, int), np.ones(N, bool)],
                         ids=["1-3", "0,5,9", "-1,1", "25-346", "one class", "one truth value"])
def test_other_integers_are_refused_with_both_cures(y, tmp_path):
    with pytest.raises(ValueError, match="expected 0 … k − 1, each at least once") as error:
        load(tmp_path, y=y)
    assert "np.unique(y, return_inverse=True)[1]" in str(error.value)
    assert "y.astype(float)" in str(error.value)


@pytest.mark.parametrize("y", [LABELS + 1, np.array([0, 5, 9])[LABELS],
                               np.array(list("abc"))[LABELS]])
def test_the_cure_for_labels_works(y, tmp_path):
    assert load(tmp_path, y=np.unique(y, return_inverse=True)[1]).y.shape[1] == 3


@pytest.mark.parametrize("n, size", [(10_001, "0.4"), (100_000, "37.3")])
def test_too_many_classes_are_refused_with_their_number_and_the_size(n, size, tmp_path):
    x, y = np.zeros((n, 1), "f"), np.random.default_rng(0).permutation(n)
    with pytest.raises(UserError, match=f"{n:,} different integers.* {size} GiB") as error:
        load(tmp_path, x, y)
    assert "at most 10,000 classes" in str(error.value)
    assert str(error.value).endswith("save y.astype(float)")
    assert load(tmp_path, x, y.astype(float)).y.shape[1] == 1


def test_one_hot_targets_that_would_be_too_large_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_ONE_HOT", 4 * 3 * N)
    assert load(tmp_path, y=LABELS).y.shape[1] == 3
    monkeypatch.setattr(data, "MAX_ONE_HOT", 4 * 3 * N - 1)
    with pytest.raises(UserError, match="holds 3 different integers.*expected at most"):
        load(tmp_path, y=LABELS)


@pytest.mark.parametrize("x, cure", [(X[:, 0], "x[:, None]"),
                                     (np.zeros((N, 8, 8)), "x.reshape(len(x), -1)")])
def test_x_of_another_shape_is_refused_with_the_cure_which_works(x, cure, tmp_path):
    with pytest.raises(ValueError, match="expected .n, columns.: save ") as error:
        load(tmp_path, x)
    assert str(error.value).endswith(cure)
    assert load(tmp_path, eval(cure, {"x": x, "len": len})).x.ndim == 2


@pytest.mark.parametrize("x, y", [(X, Y[:-1]), (X[:19], Y[:19]), (X, np.zeros((N, 2))),
                                  (X, np.float32(1))])
def test_shapes_that_do_not_fit_are_refused_with_both_shapes(x, y, tmp_path):
    with pytest.raises(ValueError, match="has shape .*expected"):
        load(tmp_path, x, y)


NOT_NUMPY = {
    "text": b"not numpy", "csv": b"0.1,0.2\n0.3,0.4\n", "empty": b"",
    "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"}


@pytest.mark.parametrize("content", NOT_NUMPY.values(), ids=NOT_NUMPY)
def test_another_file_named_npy_is_refused(content, tmp_path):
    paths = save(tmp_path, X, Y)
    paths[0].write_bytes(content)
    with pytest.raises(ValueError, match="x.npy: expected a NumPy .npy file"):
        data.load(*paths)


@pytest.mark.parametrize("damage", [
    lambda whole: whole.replace(b"(400, 2)", b"(400, 2"),
    lambda whole: whole.replace(b"(400, 2)", b"400, 2))"),
    lambda whole: whole.replace(b"descr", b"desc\xff"),
    lambda whole: whole[:200], lambda whole: whole[:9],
    lambda whole: whole[:6] + b"\x09" + whole[7:]])
def test_a_damaged_npy_file_is_refused_as_one(damage, tmp_path):
    paths = save(tmp_path, X, Y)
    damaged = damage(paths[0].read_bytes())
    assert damaged != paths[0].read_bytes()
    paths[0].write_bytes(damaged)
    with pytest.raises(ValueError, match="x.npy: expected a NumPy .npy file"):
        data.load(*paths)


@pytest.mark.parametrize("rows", [N + 1, 10**13, 2**62])
def test_a_header_that_promises_more_than_the_file_holds_is_refused_with_both_numbers(
        rows, tmp_path):
    paths, header = save(tmp_path, X, Y), io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (rows, 2)})
    paths[0].write_bytes(header.getvalue() + X.tobytes())
    with pytest.raises(UserError, match=f"with {8 * rows:,} bytes .*; it holds {8 * N:,}: save"):
        data.load(*paths)


def test_a_file_that_does_not_fit_into_memory_is_refused_as_one(tmp_path, monkeypatch):
    def no_memory(*_, **__):
        raise MemoryError
    monkeypatch.setattr(data.npy, "read_array", no_memory)
    with pytest.raises(UserError, match=f"{8 * N:,} bytes do not fit into memory"):
        load(tmp_path)


def test_a_header_of_version_2_is_read(tmp_path):
    paths = save(tmp_path, X, Y)
    with open(paths[0], "wb") as file:
        np.lib.format.write_array(file, X, version=(2, 0))
    assert data.load(*paths).digest == load(tmp_path).digest


def test_an_npz_file_is_refused(tmp_path):
    paths = save(tmp_path, X, Y)
    with open(paths[0], "wb") as file:
        np.savez(file, x=X)
    with pytest.raises(ValueError, match="x.npy: expected a NumPy .npy file"):
        data.load(*paths)


@pytest.mark.parametrize("bad, message", [
    (np.array([{}] * N), "holds an array of numbers"),
    (np.zeros(N, complex), "holds an array of numbers"),
    (np.zeros(N, "datetime64[s]"), "holds an array of numbers"),
    (np.zeros(N, [("a", "f4")]), "holds an array of numbers"),
    (np.array(["0.5"] * N), r"holds strings; expected numbers: save array.astype\(float\)"),
    (np.array([b"cat"] * N), r"np.unique\(array, return_inverse=True\)\[1\]")])
def test_what_is_not_numbers_is_refused_strings_with_the_cure(bad, message, tmp_path):
    paths = save(tmp_path, X, Y)
    np.save(paths[1], bad, allow_pickle=True)
    with pytest.raises(ValueError, match=f"y.npy.*{message}"):
        data.load(*paths)


@pytest.mark.parametrize("bad", [
    np.full(N, np.nan), np.full(N, np.inf, "f2"), np.full(N, -np.inf), np.full(N, 2e6),
    np.full(N, -2**63), np.full(N, 2**64 - 1, "u8"), np.full(N, np.nan).astype("f2")],
    ids=lambda bad: f"{bad.dtype} {bad[0]}")
def test_what_is_not_finite_or_sane_is_refused_in_either_file(bad, tmp_path):
    y, x = np.where(np.arange(N) == 7, bad, bad.dtype.type(0)), X.astype(bad.dtype)
    x[3, 1] = bad[0]
    for columns, targets in ((X, y), (x, Y)):
        with pytest.raises(ValueError, match="NaN, infinity or numbers beyond a million"):
            load(tmp_path, columns, targets)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i1", "u1", "i8", "?"])
def test_any_type_of_number_is_taken_for_x(dtype, tmp_path):
    loaded = load(tmp_path, (X > 0).astype(dtype))
    assert loaded.x.dtype == np.float32 and set(np.unique(loaded.x)) == {0, 1}


@pytest.mark.parametrize("held_out", [0, -1, N, N + 1])
def test_held_out_must_leave_something_on_both_sides(held_out, tmp_path):
    with pytest.raises(ValueError, match=f"--held-out must be from 1 to {N - 1}"):
        load(tmp_path, held_out=held_out)


def test_a_missing_file_names_what_makes_it(tmp_path):
    with pytest.raises(FileError, match="generate.py` makes x.npy"):
        data.load(tmp_path / "x.npy", tmp_path / "y.npy")


@pytest.mark.parametrize("x, where", [
    (np.column_stack([X[:, 0], np.arange(N) % 200]), "column 1 of x goes from 0 to 199"),
    (np.column_stack([np.arange(N) % 256, X[:, 0]]), "column 0 of x goes from 0 to 255"),
    (np.column_stack([X[:, 0], -1000 - X[:, 0]]), "column 1 of x goes from -1")])
def test_inputs_that_are_not_scaled_are_one_warning_with_the_cure_which_works(x, where, tmp_path):
    lines = data.describe(load(tmp_path, x), sgd.task_of).splitlines()
    assert [line.startswith("warning") for line in lines] == [False, True]
    assert where in lines[1]
    cured = eval(lines[1].split("save ")[1], {"x": x})
    assert "warning" not in data.describe(load(tmp_path, cured), sgd.task_of)


@pytest.mark.parametrize("y", [755_000 + 1000 * Y, 300 * Y])
def test_targets_that_are_not_scaled_are_one_warning_with_the_cure_which_works(y, tmp_path):
    lines = data.describe(load(tmp_path, y=y), sgd.task_of).splitlines()
    assert len(lines) == 2 and lines[1].startswith("warning: y goes from")
    cured = eval(lines[1].split("save ")[1], {"y": y})
    assert "warning" not in data.describe(load(tmp_path, y=cured), sgd.task_of)


@pytest.mark.parametrize("k, held_out", [(2, 20), (3, 20), (3, 150), (10, 20), (100, 40)])
def test_rows_sorted_by_class_are_one_warning_with_the_cure_which_works(k, held_out, tmp_path):
    x, y = np.column_stack([X, np.arange(N) / N]), np.arange(N) * k // N
    found = len(set(y[-held_out:]))
    line, warning = data.describe(load(tmp_path, x, y, held_out), sgd.task_of).splitlines()
    assert warning.startswith(f"warning: the held-out rows hold only {found} of {k} classes")
    i = eval(warning.split("i = ")[1].split(": save")[0], {"np": np, "x": x, "len": len})
    assert warning.endswith(": save x[i] and y[i]")
    cured = load(tmp_path, x[i], y[i], held_out)
    assert "warning" not in data.describe(cured, sgd.task_of)
    assert (cured.y.argmax(axis=1) == (cured.x[:, 2] * k + 1e-5).astype(int)).all()


@pytest.mark.parametrize("y", [LABELS, np.arange(N) % 100, np.arange(N) % 50 == 0,
                               (np.arange(N) < 5).astype(int)],
                         ids=["balanced", "more classes than rows", "2 in 100", "5 of 400"])
def test_a_class_that_is_missing_by_chance_is_no_warning(y, tmp_path):
    y = np.random.default_rng(1).permutation(y).astype(int)
    assert "warning" not in data.describe(load(tmp_path, y=y), sgd.task_of)


@pytest.mark.parametrize("y, width, cure", [
    (LABELS.astype(float), 3, "save y.astype(int); if they are numbers, it must end with 1"),
    (LABELS.astype(float), 2, "y holds numbers: it must end with 1"),
    (LABELS + 0.5, 4, "y holds numbers: it must end with 1"),
    (np.where(np.arange(N) == N - 1, 7, LABELS).astype(float), 3, "numbers: it must end with 1"),
    (LABELS, 1, "y holds class labels: it must end with 3")])
def test_an_output_of_another_width_is_refused_with_the_cure(y, width, cure, tmp_path):
    with pytest.raises(UserError, match="^--layers ends with") as error:
        data.check_targets(load(tmp_path, y=y), width, "--layers", sgd.task_of)
    assert str(error.value).endswith(cure)
    if "astype" in cure:
        data.check_targets(load(tmp_path, y=y.astype(int)), width, "--layers", sgd.task_of)


@pytest.mark.parametrize("reason, certificates", [
    ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local issuer "
     "certificate (_ssl.c:1006)", True),
    ("[Errno -2] Name or service not known", False)])
def test_a_download_that_fails_is_one_line_with_its_cause_and_the_cure(
        reason, certificates, monkeypatch):
    def load_data():
        url = f"https://example.org/{'long/' * 30}mnist.npz"
        raise Exception(f"URL fetch failure on {url}: None -- {reason}\nmore")
    module = types.SimpleNamespace(mnist=types.SimpleNamespace(load_data=load_data))
    monkeypatch.setitem(sys.modules, "keras", types.ModuleType("keras"))
    monkeypatch.setitem(sys.modules, "keras.datasets", module)
    with pytest.raises(UserError) as error:
        digits("")
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert ("Install Certificates.command" in str(error.value)) == certificates
    assert str(error.value).endswith("download mnist.npz by hand, and give --digits FILE.npz")


def test_a_file_of_other_images_is_one_line(tmp_path):
    x, y = np.zeros((5, 8, 8), np.uint8), np.zeros(5, np.uint8)
    np.savez(tmp_path / "eight.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(UserError, match="eight.npz: expected .* not of 28 by 28"):
        digits(tmp_path / "eight.npz")


def test_good_data_is_one_line_without_a_warning(tmp_path):
    line, = data.describe(load(tmp_path), sgd.task_of).splitlines()
    assert line.startswith("380 examples to train on, 20 held out")


def test_the_start_of_a_run_says_what_a_constant_guess_would_score(tmp_path):
    y = (np.arange(N) % 50 == 0).astype(int)  # 98 : 2
    loaded = load(tmp_path, y=y, held_out=100)
    assert data.constant_guess(loaded, sgd.task_of) == pytest.approx(0.02)
    line = data.describe(loaded, sgd.task_of)
    assert "commonest class would have a held-out error of 0.0200" in line
    loaded = load(tmp_path)
    mean = Y[:380].mean()
    score = np.mean((Y[380:] - mean) ** 2)
    assert data.constant_guess(loaded, sgd.task_of) == pytest.approx(score, rel=1e-5)
    assert "the mean would have a held-out MSE" in data.describe(loaded, sgd.task_of)


def test_other_data_has_another_digest(tmp_path):
    digests = [load(tmp_path, x, y, held_out).digest for x, y, held_out in
               ((X, Y, None), (X, Y, 21), (X + np.float32(1e-3), Y, None), (X, -Y, None))]
    assert len(set(digests)) == 4 and load(tmp_path).digest == digests[0]


def test_a_file_that_holds_its_columns_one_after_the_other_is_the_same_data(tmp_path):
    paths = save(tmp_path, np.asfortranarray(X), Y)
    assert np.load(paths[0]).flags.f_contiguous
    assert data.load(*paths).digest == load(tmp_path).digest


def test_sgd_prints_the_warnings_at_its_start(tmp_path, monkeypatch, capsys):
    paths = save(tmp_path, 100 * X, Y)
    monkeypatch.setattr(sys, "argv", ["sgd.py", *map(str, paths), "--num-epochs", "1",
                                      "--progress-dir", str(tmp_path / "run")])
    sgd.main()
    assert "warning: column" in capsys.readouterr().out


@pytest.mark.processes
@pytest.mark.parametrize("script", ["sgd.py", "train_input.py"])
def test_bad_data_is_one_line_and_exit_code_2(script, tmp_path):
    paths, log = save(tmp_path, X, LABELS + 1), tmp_path / "log"
    process = start(script, *paths, "--progress-dir", tmp_path / "run", log=log)
    assert process.wait(60) == 2
    line, = log.read_text().splitlines()
    assert line.startswith(f"{script}: ") and "np.unique" in line
    assert not (tmp_path / "run").exists()


def test_examples_that_cannot_be_written_leave_the_old_ones_as_a_pair(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "y.npy.tmp").mkdir()  # so that y.npy cannot be written
    monkeypatch.setattr(sys, "argv", ["generate.py", "--num-examples", "5", "--dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        generate.main()
    assert stopped.value.code == 2 and (np.load(tmp_path / "x.npy") == X).all()
