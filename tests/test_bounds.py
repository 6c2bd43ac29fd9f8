"""The two bounds, on staleness and on replay: real processes, and a proxy that loses what the trainers throw."""
import numpy as np
import pytest

from synthgrad import LayerClient, OracleClient
from tests.processes import Three, wait_until

STALENESS, REPLAY = 7, 8


def still(read):
    """Wait until four readings, half a second apart, are equal; returns the reading."""
    seen = []

    def settled():
        seen.append(read())
        return len(seen) > 3 and all(each == seen[-1] for each in seen[-4:])
    wait_until(settled, "it to stand still", pause=0.5)
    return seen[-1]


@pytest.mark.parametrize("lost", ["gradients", "activations"])
def test_layer_1_stops_at_exactly_the_bound_and_goes_on_when_news_comes(lost, tmp_path, small_data):
    three = Three(tmp_path, input=[*small_data, "--num-epochs", 10**6, "--staleness", STALENESS])
    link = three.to_oracle if lost == "gradients" else three.to_output
    with three:
        if lost == "gradients":
            three.commands["output"] += ["--oracle-server", f"127.0.0.1:{link.port}"]
        else:
            three.commands["input"] += ["--output-server", f"127.0.0.1:{link.port}"]
        link.cut = lost == "gradients"
        three.start()
        if lost == "gradients":  # the oracle knows nothing: that counts from the first question, of update 0
            wait_until(lambda: "it has learned from" in three.log("input"), "layer 1 to wait")
            assert still(lambda: three.status("input")["updates"]) == STALENESS + 1
            assert three.status("oracle")["learned"] is None
            link.cut = False
        wait_until(lambda: (three.status("input") or {}).get("updates", 0) > 100, "layer 1 to go on")
        link.cut, waited = True, three.log("input").count("it has learned from")
        wait_until(lambda: three.log("input").count("it has learned from") > waited, "layer 1 to wait again")
        learned = three.status("oracle")["learned"]
        assert still(lambda: three.status("input")["updates"]) == learned + STALENESS + 1
        link.cut = False  # what was lost never comes: layer 1 must throw again
        wait_until(lambda: three.status("input")["updates"] > learned + 100, "layer 1 to go on")
        status = three.status("input")
        assert status["staleness_p95"] <= STALENESS and status["waits"] >= 1 and status["waited"] > 1
        assert status["examples_sent"]["thrown"] > 100 * status["updates"]


def test_while_the_oracle_is_away_the_output_trainer_is_not_fed_the_same_minibatch_again_and_again(tmp_path, small_data):
    with Three(tmp_path, input=[*small_data, "--num-epochs", 10**6]) as three:
        three.start()
        wait_until(lambda: (three.status("input") or {}).get("updates", 0) > 100, "training")
        three.kill("oracle")
        received = still(lambda: three.status("output")["examples"]["received"])
        assert received == three.status("input")["examples_sent"]["thrown"]


def test_an_output_trainer_that_answers_late_slows_layer_1_down_and_no_guess_is_too_old(tmp_path, small_data):
    three = Three(tmp_path, input=[*small_data, "--num-epochs", 10**6, "--staleness", STALENESS, "--snapshot-seconds", 1])
    with three:
        three.commands["output"] += ["--oracle-server", f"127.0.0.1:{three.to_oracle.port}"]
        three.to_oracle.delay = 0.2
        three.start()
        wait_until(lambda: len(three.metrics("updates")) > 6, "a few rows")
    assert max(three.metrics("staleness_p95")[2:]) <= STALENESS and three.metrics("waits")[-1] > 5
    updates, seconds = three.metrics("updates"), three.metrics("seconds")
    assert updates[-1] / seconds[-1] < 2 * STALENESS / 0.2


def test_without_news_both_learners_stop_after_their_replay_and_still_answer(tmp_path, small_data):
    keep = ["--keep", 50_000]  # more than arrives here, so that no allowance lapses on a busy machine
    with Three(tmp_path, oracle=keep, output=keep, input=[*small_data, "--num-epochs", 10**6]) as three:
        three.start()
        wait_until(lambda: (three.status("input") or {}).get("updates", 0) > 300, "some training")
        three.kill("input")
        output, oracle = (LayerClient(f"127.0.0.1:{three.port('output')}"), OracleClient(f"127.0.0.1:{three.port('oracle')}"))

        def learned():
            return [(three.status(name)["updates"], three.status(name)["examples"]) for name in ("output", "oracle")]
        (_, at_output), (_, at_oracle) = before = still(learned)
        weights, _ = output.weights([24, 12, 1])
        h, y = np.full((100, 24), 0.5, "f"), np.zeros((100, 1), "f")
        guesses = [oracle.estimate_gradients(h, y)[0] for _ in range(100)]
        assert (guesses[0] == guesses[-1]).all() and guesses[0].any()
        assert learned() == before
        for (w, b), (w_again, b_again) in zip(weights, output.weights([24, 12, 1])[0]):
            assert (w == w_again).all() and (b == b_again).all()
        for examples, batch in ((at_output, 100), (at_oracle, 2000)):
            assert REPLAY * examples["received"] - batch < examples["drawn"] <= REPLAY * examples["received"]


def test_learned_never_runs_ahead_of_what_the_answering_model_has_seen(tmp_path):
    with Three(tmp_path) as three:
        three.start("oracle")
        client = OracleClient(f"127.0.0.1:{three.port('oracle')}")
        wait_until(lambda: (three.status("oracle") or {}).get("ready"), "TensorFlow to start")
        rng = np.random.default_rng(0)

        def provide(rows, clock):
            h = rng.random((rows, 24), "f")
            client.provide_gradients(np.arange(rows), h, h[:, :1], np.full(rows, clock), h - 0.5)

        def ask():
            return client.estimate_gradients(np.ones((1, 24), "f"), np.ones((1, 1), "f"))
        provide(1, clock=1000)  # too little to train on
        guess, learned = ask()
        assert learned is None and not guess.any()
        provide(1999, clock=5)
        wait_until(lambda: ask()[1] is not None, "it to learn")
        still(lambda: three.status("oracle")["updates"])
        guess, learned = ask()
        assert learned in (5, 1000) and guess.any()
        provide(1, clock=5000)  # received, and too little to train on
        assert three.status("oracle")["examples"]["received"] == 2001
        assert all(ask()[1] == learned for _ in range(20))
        provide(1999, clock=6000)
        wait_until(lambda: ask()[1] in (5000, 6000), "it to learn from the news")
