"""`make bench-long`: the best held-out MSE of the decoupled run within half of the time that sgd.py needs for 100
epochs, over sgd.py's MSE after those 100 epochs. About a quarter of an hour."""
import tempfile
from pathlib import Path

from tests.benchmarks.measure import print_table, run_sgd, run_three


def main():
    with tempfile.TemporaryDirectory() as name:
        plain = run_sgd(Path(name) / "sgd", "--num-epochs", 100)
        seconds, goal = plain["seconds"][-1], plain["test_mse"][-1]
        print(f"sgd.py: 100 epochs in {seconds:.0f} s, held-out MSE {goal:.4f}; now {seconds / 2:.0f} s decoupled")
        ours = run_three(Path(name) / "synthetic", seconds / 2)
    best = ours["test_mse"][ours["seconds"] <= seconds / 2 + 1].min()
    print_table(("best MSE within half of sgd.py's time for 100 epochs, over sgd.py's", f"{best / goal:.2f}", "1.0",
                 f"{best:.4f} against {goal:.4f}"))


if __name__ == "__main__":
    main()
