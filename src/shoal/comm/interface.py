"""Which of a host's network interfaces leads to the other ranks.

    use_the_way_to("tcp:10.0.0.7:29500")         # gloo listens on eth1 from now on

gloo listens at the address that the host's own name stands for. On many hosts that is 127.0.0.1 or
127.0.1.1 (Debian's /etc/hosts), where no other host can reach it, or that of another network. Rank
0's address is one that all ranks can reach: the interface that leads there is the right one.
"""

import contextlib
import socket
import struct
import sys

from shoal import env

_SIOCGIFADDR = 0x8915  # Linux, netdevice(7): the IPv4 address of an interface


def use_the_way_to(place: str) -> None:
    """Have gloo use the interface that leads to the store at `place`.

    Nothing happens if the user has named one (GLOO_SOCKET_IFNAME), for ranks that meet in a file,
    or where it cannot be found out: gloo then looks for itself.
    """
    kind, _, where = place.partition(":")
    if kind == "file" or env.gloo_interface() is not None:
        return
    host, _, port = where.rpartition(":")
    name = interface_to(host, int(port))
    if name is not None:
        env.set_variable("GLOO_SOCKET_IFNAME", name)


def interface_to(host: str, port: int) -> str | None:
    """The name of the interface whose address packets to `host` carry; None if not found."""
    if not sys.platform.startswith("linux"):
        return None
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect((host, port))  # a datagram socket sends nothing by this
        ours = asking.getsockname()[0]
        for _, name in socket.if_nameindex():
            if _address(asking, name) == ours:
                return name
    return None


def _address(asking: socket.socket, name: str) -> str | None:
    import fcntl  # not on every system

    with contextlib.suppress(OSError):  # an interface without an address
        found = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        return socket.inet_ntoa(found[20:24])
    return None
