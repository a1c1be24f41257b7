"""What [network] says about ports and names: "[ADDRESS:]HOST:GUEST", "NAME[:PORT]". A ValueError says what is wrong."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

LOOPBACK = "127.0.0.1"
_EVERY = ("0.0.0.0", "::")  # noqa: S104  # compared with, never bound: it takes the port of every address

_PUBLISH = re.compile(r"(?:(?P<v4>[0-9.]+):|\[(?P<v6>[0-9a-fA-F:.]+)\]:)?(?P<outside>[0-9]+):(?P<inside>[0-9]+)")
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
_RULE = re.compile(r"(?P<target>\[[^\]]*\](?:/[0-9]+)?|[^:\[\]]+)(?::(?P<port>[0-9]+))?")

Published = tuple[str, int, int]  # the address and port of the host, the port inside
Rule = tuple[str, str, int]  # "name" or "net", which one, and the port or 0 for every one


def parse_publish(text: str) -> Published:
    """ "8000:80" -> ("127.0.0.1", 8000, 80): only this machine can reach it unless an address is said."""
    match = _PUBLISH.fullmatch(text)
    if match is None:
        raise ValueError(f'"{text}": expected [ADDRESS:]HOST:GUEST, as in "8000:8000" or "0.0.0.0:8000:80"')
    address = str(ipaddress.ip_address(match["v4"] or match["v6"] or LOOPBACK))
    return address, parse_port(match["outside"]), parse_port(match["inside"])


def parse_published(texts: Iterable[str]) -> list[Published]:
    """All of them; two that want the same port of the host are refused."""
    published: list[Published] = []
    for text in texts:
        new = parse_publish(text)
        for old in published:
            if old[1] == new[1] and (old[0] == new[0] or {old[0], new[0]} & set(_EVERY)):
                raise ValueError(f'"{text}": port {new[1]} of the host is published twice')
        published.append(new)
    return published


def parse_port(text: str | int) -> int:
    port = int(text) if len(str(text)) <= 5 else 0
    if not 1 <= port <= 65535:
        raise ValueError(f"{text}: a port is a number from 1 to 65535")
    return port


def parse_rule(text: str) -> Rule:
    """ "*.example.org:443", "example.org", "10.0.0.0/8:22" or "[2001:db8::]/32": what it is, without a port 0."""
    match = _RULE.fullmatch(text)
    if match is None:
        raise ValueError(f'"{text}": expected NAME[:PORT], *.NAME[:PORT] or NETWORK[:PORT]')
    port = parse_port(match["port"]) if match["port"] else 0
    target = match["target"].replace("[", "").replace("]", "")
    try:
        return "net", str(ipaddress.ip_network(target)), port
    except ValueError:
        looks_like_one = "/" in target or ":" in target or re.fullmatch(r"[0-9.]+", target)
    if looks_like_one:
        raise ValueError(f'"{text}": {target} is no network: are bits set beyond its prefix?')
    if not _is_host_name(target.removeprefix("*.")):
        raise ValueError(f'"{text}": {target} is no host name')
    return "name", target.lower(), port


def _is_host_name(name: str) -> bool:
    """RFC 1123, section 2.1: letters, digits and hyphens between dots."""
    return len(name) <= 253 and all(_LABEL.fullmatch(label) for label in name.split("."))
