"""What the kernel says that this process wrote, and what of it is not payload."""

from pathlib import Path

GLOO_HEADER_BYTES = 48
"""sizeof(gloo::transport::tcp::Op), which precedes each message."""

GLOO_SEND_BYTES = 2 * GLOO_HEADER_BYTES
"""Headers that a rank writes per message sent: the notice that a send is ready, and the header of the data
(gloo/transport/tcp/pair.cc). Checked in tests/test_wire.py."""

GLOO_RECEIVE_BYTES = GLOO_HEADER_BYTES
"""What it writes per message received: the notice that a receive is ready."""


def written_bytes() -> int:
    """Bytes that this process has passed to write() and writev() so far, to sockets and files alike.

    Linux only: the `wchar` field of /proc/self/io (proc_pid_io(5)). Bytes sent with send() are not in it; Gloo uses
    writev().
    """
    for line in Path("/proc/self/io").read_text().splitlines():
        name, _, value = line.partition(": ")
        if name == "wchar":
            return int(value)
    raise OSError("/proc/self/io has no field 'wchar'")
