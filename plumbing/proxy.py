"""A slow network: a port that passes everything on to another one, a while later."""
import contextlib
import queue
import socket
import threading
import time


class Proxy:
    """Passes bytes on to 127.0.0.1:target, `seconds` after they came, in both directions.

    Bytes follow each other as fast as they came: it adds delay, and takes no bandwidth away.
    """

    def __init__(self, target, seconds):
        self.target, self.seconds = target, seconds
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):  # until close()
            while True:
                near = self.socket.accept()[0]
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                    for each in (near, far):
                        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                except OSError:  # nobody there yet: as if this port did not answer either
                    near.close()
                    continue
                for source, sink in ((near, far), (far, near)):
                    on_its_way = queue.SimpleQueue()
                    for work, end in ((self._take, source), (self._give, sink)):
                        threading.Thread(target=work, args=(end, on_its_way), daemon=True).start()

    def _take(self, source, on_its_way):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                on_its_way.put((time.monotonic() + self.seconds, data))
        on_its_way.put((0, b""))

    def _give(self, sink, on_its_way):
        with contextlib.suppress(OSError):
            while (item := on_its_way.get())[1]:
                time.sleep(max(0, item[0] - time.monotonic()))
                sink.sendall(item[1])
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def close(self):
        """Take no more connections."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # or accept() goes on, on Linux
        self.socket.close()
