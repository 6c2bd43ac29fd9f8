"""A network switch in user space, for test_hosts.py: passes Ethernet frames on, late, and loses
some of them.

    python tests/switch.py 0.02 0.01 oracle output input  # delay, share lost, interfaces

For kernels that lack netem. It keeps up with three processes, and holds no more than what they send
in that time.
"""
import collections
import contextlib
import random
import select
import socket
import sys
import time

ETH_P_ALL, SOL_PACKET, PACKET_VNET_HDR = 3, 263, 15


def open_port(interface):
    """A raw socket. What it reads and writes begins with the kernel's notes on checksums and
    segments yet to be made."""
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    port.bind((interface, ETH_P_ALL))
    return port


def main(delay, loss, *interfaces):
    delay, loss = float(delay), float(loss)
    ports = [open_port(interface) for interface in interfaces]
    waiting = collections.deque()
    while True:
        timeout = max(0, waiting[0][0] - time.monotonic()) if waiting else None
        for source in select.select(ports, [], [], timeout)[0]:
            frame = source.recv(2**17)
            if random.random() >= loss:
                waiting.append((time.monotonic() + delay, source, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, source, frame = waiting.popleft()
            for port in ports:
                if port is not source:
                    with contextlib.suppress(OSError):  # lost, as on a wire
                        port.send(frame)


if __name__ == "__main__":
    main(*sys.argv[1:])
