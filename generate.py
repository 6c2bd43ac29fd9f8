"""Make the training data: a lumpy function on [-1, 1]^2, sampled uniformly.

The target has no significance. It is smooth enough to learn and lumpy enough that a network must work for it.

    python generate.py                      # writes x.npy, y.npy and target.png

x.npy holds the inputs, (num_examples, 2) float32; y.npy the target at each of them, (num_examples,) float32.
train_input.py and sgd.py read these two files; plot.py calls target() to draw the right answer.
"""
import argparse
import sys
from pathlib import Path

import numpy as np


def target(x):
    """The function to be learned, at the points x: (..., 2) -> (...). Its variance on the square is about 0.161."""
    r = np.hypot(x[..., 0], x[..., 1])
    theta = np.arctan2(x[..., 1], x[..., 0])
    k = 0.3 * (np.sin(theta) + 1)
    return (k * np.sin(4 * r**2 - r / 4)
            + (1 - k) / 2 * np.sin(2 * theta) * np.sin(theta)
            + (1 - k) / 2 * np.cos(6 * (theta + 0.1)))


def sample(num_examples, seed):
    """Draw inputs uniformly from the square; returns x (num_examples, 2) and y (num_examples,), float32."""
    x = np.random.default_rng(seed).uniform(-1, 1, (num_examples, 2)).astype(np.float32)
    return x, target(x).astype(np.float32)


def draw(path):
    """Draw the target as filled contours."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axis = np.linspace(-1, 1, 300)
    z = target(np.stack(np.meshgrid(axis, axis), axis=-1))
    figure, axes = plt.subplots(figsize=(5.6, 4.6), layout="constrained")
    contours = axes.contourf(axis, axis, z, levels=np.linspace(-1, 1, 21), cmap="cividis", extend="both")
    figure.colorbar(contours, label="target z")
    axes.set(title="The function to learn", xlabel="$x_1$", ylabel="$x_2$", aspect="equal", xticks=(-1, -0.5, 0, 0.5, 1))
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-examples", type=int, default=200_000, help="how many points to draw (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers (%(default)s)")
    parser.add_argument("--dir", type=Path, default=Path("."), help="where to write (the current folder)")
    args = parser.parse_args()
    if args.num_examples < 1 or args.seed < 0:
        parser.error("--num-examples must be at least 1 and --seed at least 0")
    try:
        x, y = sample(args.num_examples, args.seed)
        np.save(args.dir / "x.npy", x)
        np.save(args.dir / "y.npy", y)
        draw(args.dir / "target.png")
    except OSError as error:
        parser.exit(2, f"generate.py: cannot write: {error}\n")
    print(f"{len(x)} examples, variance of the target {y.var():.3f}: "
          f"{args.dir / 'x.npy'}, {args.dir / 'y.npy'}, {args.dir / 'target.png'}")


if __name__ == "__main__":
    sys.exit(main())
