"""The network interface that gloo uses between hosts."""

import fcntl
import ipaddress
import os
import socket
import struct

import torch.distributed as dist

_SIOCGIFADDR = 0x8915  # returns the IPv4 address of an interface, on Linux
_VARIABLE = "GLOO_SOCKET_IFNAME"


def choose_interface(store: dist.Store, rank: int, world_size: int) -> None:
    """Set GLOO_SOCKET_IFNAME where gloo's default cannot be reached from other hosts, unless it is set.

    gloo uses the address of the host's own name. With Debian's /etc/hosts that is 127.0.1.1, so ranks on other hosts
    could not connect, and all would wait for the timeout. The interface is then the one that leads to MASTER_ADDR or,
    on that host itself, to a rank on another host. Without other hosts, or without IPv4, nothing is set.

    store: known to these ranks only. It is where they publish from which address they reach MASTER_ADDR.
    """
    address = _address_towards(os.environ["MASTER_ADDR"])
    store.set(f"address of rank {rank}", address)
    if _VARIABLE in os.environ or not _is_loopback(_address_of(socket.gethostname())):
        return
    if _is_loopback(address):
        published = store.multi_get([f"address of rank {other}" for other in range(world_size)])
        others = [other.decode() for other in published if not _is_loopback(other.decode())]
        address = _address_towards(others[0]) if others else ""
    if name := _interface_of(address):
        os.environ[_VARIABLE] = name


def _address_of(host: str) -> str:
    """Return the first address of a host name; "" if it has none."""
    try:
        return str(socket.getaddrinfo(host, None)[0][4][0])
    except OSError:
        return ""


def _address_towards(host: str) -> str:
    """Return this host's IPv4 address on the way to another, or "" if there is no way. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        try:
            sender.connect((host, 9))  # any port
            return str(sender.getsockname()[0])
        except OSError:
            return ""


def _is_loopback(address: str) -> bool:
    """Whether other hosts cannot use the address: one of the loopback interface, or "" for none."""
    return not address or ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _interface_of(address: str) -> str | None:
    """Return the name of the interface with this IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
