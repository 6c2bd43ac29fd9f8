"""The thread that posts what has been thrown into an outbox."""
import threading

from plumbing import say

PAUSE = 0.004    # seconds between posts: what is thrown meanwhile shares one request
TRY_AGAIN = 0.5  # seconds until a post that failed is followed by the next one


class Poster:
    """Posts an outbox's messages until it is closed. `to` names the receiver in what is printed."""

    def __init__(self, outbox, post, to):
        self.outbox, self.post, self.to = outbox, post, to
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        reachable = True
        while columns := self.outbox.next_message():
            try:
                self.post(*columns)
                delivered = True
            except Exception as error:  # whatever it is, it is reported, and the thread goes on
                delivered = False
                if reachable:
                    say(f"{self.to} does not take what is sent to it ({error}); messages are "
                        "dropped until it does")
            if delivered and not reachable:
                say(f"{self.to} takes messages again")
            reachable = delivered
            self.outbox.count(len(columns[0]), delivered)
            with self.outbox.changed:
                self.outbox.changed.wait_for(lambda: self.outbox.closing,
                                             PAUSE if delivered else TRY_AGAIN)
                if self.outbox.closing and not delivered:
                    return

    def close(self, timeout):
        """Post what still waits, for at most `timeout` seconds."""
        with self.outbox.changed:
            self.outbox.closing = True
            self.outbox.changed.notify_all()
        self.thread.join(timeout)
