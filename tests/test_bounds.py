"""The two bounds, on staleness and on replay, between real processes: a proxy loses what the
trainers throw. The rules themselves: test_exchange.py and test_links.py. Those of a server:
test_serving.py."""
import numpy as np
import pytest

from synthgrad import OracleClient, PartClient
from tests.processes import Three, still, wait_until

pytestmark = pytest.mark.processes
STALENESS = 7


def test_layer_1_stops_at_exactly_the_bound_and_goes_on_when_news_comes(tmp_path, small_data):
    """Gradients are lost on their way to the oracle, then activations on their way to the output
    trainer. Layer 1 throws the same minibatches again and again; each example counts once."""
    three = Three(tmp_path, output=["--replay", 0], input=[
        *small_data, "--num-epochs", 10**6, "--staleness", STALENESS, "--snapshot-seconds", 10**6])
    three.commands["output"] += ["--oracle-server", f"127.0.0.1:{three.to_oracle.port}"]
    three.commands["input"] += ["--output-server", f"127.0.0.1:{three.to_output.port}"]
    waiting = "--staleness is 7"
    with three:
        three.to_oracle.cut = True
        three.start()
        # the oracle knows nothing: that counts from the first question
        wait_until(lambda: waiting in three.log("input"), "layer 1 to wait")
        assert still(three.updates) == STALENESS
        assert three.status("oracle")["learned"] is None
        thrown = 100 * (STALENESS + 1)  # the last minibatch waits for its gradient
        wait_until(lambda: three.status("input")["examples_sent"]["thrown"] > 3 * thrown,
                   "it to throw again")
        status = three.status("output")
        assert status["examples"]["received"] == thrown
        assert status["updates"] + status["skipped"] <= STALENESS + 1
        three.to_oracle.cut = False
        wait_until(lambda: three.updates() > 100, "layer 1 to go on")
        for link in (three.to_oracle, three.to_output):
            waits = three.log("input").count(waiting)
            link.cut = True
            wait_until(lambda waits=waits: three.log("input").count(waiting) > waits,
                       "layer 1 to wait again")
            learned = three.status("oracle")["learned"]
            assert still(three.updates) == learned + STALENESS + 1
            link.cut = False  # what was lost never comes: layer 1 must throw again
            wait_until(lambda learned=learned: three.updates() > learned + 100,
                       "layer 1 to go on")
        status = three.status("input")
    assert status["staleness_p95"] <= STALENESS and status["waits"] >= 3 and status["waited"] > 1


def test_with_minibatches_of_one_a_loss_of_all_in_flight_is_made_good_soon(tmp_path, small_data):
    with Three(tmp_path, input=[*small_data, "--num-epochs", 10**6, "--batch-size", 1,
                                "--staleness", 250]) as three:
        three.commands["output"] += ["--oracle-server", f"127.0.0.1:{three.to_oracle.port}"]
        three.to_oracle.cut = True
        three.start()
        wait_until(lambda: three.updates() == 250, "layer 1 to wait")
        three.to_oracle.cut = False
        wait_until(lambda: three.updates() > 400, "it to go on", timeout=15)


def test_without_news_both_learners_stop_after_their_replay_and_still_answer(
        tmp_path, small_data):
    keep = ["--keep", 50_000]  # more than arrives here, so that no allowance lapses
    with Three(tmp_path, oracle=keep, output=keep,
               input=[*small_data, "--num-epochs", 10**6]) as three:
        three.start()
        wait_until(lambda: three.updates() > 200, "some training")
        three.kill("input")
        output = PartClient(f"127.0.0.1:{three.port('output')}")
        oracle = OracleClient(f"127.0.0.1:{three.port('oracle')}")

        def learned():
            statuses = [three.status(name) for name in ("output", "oracle")]
            return [(status["updates"], status["examples"]) for status in statuses]
        (_, at_output), (_, at_oracle) = before = still(learned)
        weights, _ = output.weights([24, 12, 1])
        h, y = np.full((100, 24), 0.5, "f"), np.zeros((100, 1), "f")
        guesses = [oracle.estimate_gradients(h, y)[0] for _ in range(100)]
        assert (guesses[0] == guesses[-1]).all() and guesses[0].any()
        assert learned() == before
        for pair, pair_again in zip(weights, output.weights([24, 12, 1])[0], strict=True):
            assert all((a == b).all() for a, b in zip(pair, pair_again, strict=True))
    for examples, batch, replay in ((at_output, 100, 8), (at_oracle, 1000, 4)):
        allowed = replay * examples["received"]
        assert allowed - batch < examples["drawn"] <= allowed
