"""Make the training data: a lumpy function on [-1, 1]², sampled uniformly; or handwritten digits.

    python generate.py                      # the function: x.npy, y.npy and target.png
    python generate.py --digits             # MNIST, which Keras downloads once
    python generate.py --digits FILE.npz    # from a file in the form of Keras' mnist.npz

x.npy holds the inputs, (n, 2) or (n, 784) float32; y.npy the target at each of them, (n,): float32
numbers, or int64 classes. The function has no meaning of its own: it is smooth enough to learn, and
has enough hills that learning it takes a while. train_input.py and sgd.py read these two files;
plot.py calls target() to draw the function beside what was learned.
"""
from pathlib import Path

from plumbing import new_figure, options, runs  # first, see there
from plumbing.errors import UserError, file_errors
import numpy as np


def target(x):
    """The function to be learned, at the points x: (..., 2) -> (...). Its variance over the square
    is about 0.161."""
    r = np.hypot(x[..., 0], x[..., 1])
    theta = np.arctan2(x[..., 1], x[..., 0])
    k = 0.3 * (np.sin(theta) + 1)
    return (k * np.sin(4 * r**2 - r / 4)
            + (1 - k) / 2 * np.sin(2 * theta) * np.sin(theta)
            + (1 - k) / 2 * np.cos(6 * (theta + 0.1)))


def sample(num_examples, seed):
    """Draw inputs uniformly from the square; returns x (num_examples, 2) and y (num_examples,),
    float32."""
    x = np.random.default_rng(seed).uniform(-1, 1, (num_examples, 2)).astype(np.float32)
    return x, target(x).astype(np.float32)


def digits(path):
    """MNIST: x (n, 784) float32 from 0 to 1, y (n,) int64, and how many of the last examples are
    its own test set.

    UserError if Keras cannot download it, or if the file is not in its form.
    """
    names = "x_train", "y_train", "x_test", "y_test"
    if path:
        try:
            with np.load(path, allow_pickle=False) as file:
                x, y, x_test, y_test = (file[name] for name in names)
            if not x.shape[1:] == x_test.shape[1:] == (28, 28):
                raise ValueError("the images are not of 28 by 28")
        except OSError:
            raise
        except Exception as error:  # a damaged header raises whatever Python's tokenizer raises
            raise UserError(f"{path}: expected an .npz file of {', '.join(names)} "
                             f"({error})") from None
    else:
        from keras.datasets import mnist
        try:
            (x, y), (x_test, y_test) = mnist.load_data()
        except Exception as error:  # whatever the downloader raises
            reason = " ".join(str(error).split()).split(" -- ")[-1]  # Keras puts a long URL first
            cure = ("Python finds no certificates: on macOS run 'Install Certificates.command' in "
                    "Python's folder, elsewhere install the package ca-certificates; or "
                    if "certificate" in reason.lower() else "")
            raise UserError(f"MNIST cannot be downloaded here ({reason}). {cure}download mnist.npz "
                            "by hand, and give --digits FILE.npz") from None
    x = np.concatenate([x, x_test]).reshape(-1, x[0].size).astype(np.float32) / 255
    return x, np.concatenate([y, y_test]).astype(np.int64), len(x_test)


def draw_target(figure):
    """The function as filled contours."""
    axis = np.linspace(-1, 1, 300)
    z = target(np.stack(np.meshgrid(axis, axis), axis=-1))
    axes = figure.subplots()
    levels = np.linspace(-1, 1, 21)
    contours = axes.contourf(axis, axis, z, levels=levels, cmap="cividis", extend="both")
    figure.colorbar(contours, label="target")
    axes.set(title="The function to learn", xlabel="$x_1$", ylabel="$x_2$", aspect="equal",
             xticks=(-1, -0.5, 0, 0.5, 1))


def draw_digits(figure, x, y):
    """The first 24 digits, under their labels."""
    for axes, image, label in zip(figure.subplots(4, 6).flat, x, y, strict=False):
        axes.imshow(image.reshape(28, 28), cmap="gray_r")
        axes.set_title(label, fontsize=9)
        axes.axis("off")


def main():
    parser = options.make_parser(__doc__, seed=0)
    add = parser.add_argument
    add("--num-examples", type=options.number(int, 1), default=200_000,
        help="how many points to draw (%(default)s)")
    add("--digits", nargs="?", const="", metavar="FILE.npz",
        help="MNIST instead: downloaded, or from a file")
    add("--dir", type=Path, default=Path("."), help="where to write (the current folder)")
    args = parser.parse_args()
    figure = new_figure((5.6, 4.6))
    with options.one_line_errors(parser), file_errors():
        if args.digits is None:
            x, y = sample(args.num_examples, args.seed)
            draw_target(figure)
            about = f"variance of the target {y.var():.3f}"
        else:
            x, y, held_out = digits(args.digits)
            draw_digits(figure, x, y)
            about = f"MNIST's own test set comes last: train with --held-out {held_out}"
        with (runs.replacing(args.dir / "x.npy") as x_file,
              runs.replacing(args.dir / "y.npy") as y_file):
            np.save(x_file, x)
            np.save(y_file, y)
        figure.savefig(args.dir / "target.png", dpi=110)
    print(f"{len(x)} examples, {about}: x.npy, y.npy and target.png in {args.dir.resolve()}")


if __name__ == "__main__":
    main()
