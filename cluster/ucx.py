"""What UCX finds on this machine, asked of the very library that NIXL brings.

``transports`` runs this file as a program of its own, for a library that looks at all devices
may take its process with it, and reads what it prints. It is what UCX's ``ucx_info -d``
does, which NIXL's packages leave out (``uct_query_components`` and what follows, in UCX's
``uct.h``). What ``UCX_TLS`` and ``UCX_NET_DEVICES`` allow of it is decided above that.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path

import msgspec

from coordinator.protocol import Transport

ASK_S = 20.0
PACKAGES = ("nixl_cu12", "nixl_cu13")
NAME_BYTES = 16
NAME_FIELD, MD_COUNT_FIELD, MD_FIELD = 1, 2, 4
"""Bits that say which members of ``uct_component_attr_t`` are asked for."""


class UcxError(Exception):
    """UCX could not be asked."""


class Found(msgspec.Struct, frozen=True):
    """UCX's version, and every transport with every device that it works over here."""

    version: str
    transports: list[Transport]


class _ComponentAttributes(ctypes.Structure):
    # Longer than what is asked for: newer versions have more members.
    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * NAME_BYTES),
        ("md_count", ctypes.c_uint),
        ("mds", ctypes.c_void_p),
        ("rest", ctypes.c_byte * 512),
    )


class _TransportResource(ctypes.Structure):
    _fields_ = (
        ("transport", ctypes.c_char * 10),
        ("device", ctypes.c_char * 32),
        ("kind", ctypes.c_int),
        ("system_device", ctypes.c_uint8),
    )


def transports() -> Found:
    """What UCX finds here. UcxError if there is no UCX, or it does not answer."""
    command = [sys.executable, "-m", "cluster.ucx"]
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, timeout=ASK_S)
    except subprocess.TimeoutExpired as error:
        raise UcxError(f"UCX did not answer within {ASK_S:.0f} s") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise UcxError(said[-1] if said else f"ended with code {done.returncode}")
    # UCX prints warnings wherever it likes; ours is the last line.
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Found)


def main() -> int:
    """Prints what there is as one line of JSON. Returns the exit code."""
    folder = _library_folder()
    if folder is None:
        print("NIXL is not installed", file=sys.stderr)
        return 1
    # The first brings the others along; on its own, each would miss the others' symbols.
    ucp = _load(folder, "libucp")
    uct = _load(folder, "libuct")
    ucp.ucp_get_version_string.restype = ctypes.c_char_p
    version = ucp.ucp_get_version_string().decode()
    print(msgspec.json.encode(Found(version, _resources(uct))).decode())
    return 0


def _library_folder() -> Path | None:
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent.parent / f"{name}.libs"
    return None


def _load(folder: Path, name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(next(folder.glob(f"{name}-*.so*"))), mode=ctypes.RTLD_GLOBAL)


def _resources(uct: ctypes.CDLL) -> list[Transport]:
    components = ctypes.POINTER(ctypes.c_void_p)()
    count = ctypes.c_uint()
    _checked(uct.uct_query_components(ctypes.byref(components), ctypes.byref(count)))
    found = []
    for index in range(count.value):
        component = ctypes.c_void_p(components[index])
        for name in _domains(uct, component):
            found += _of_domain(uct, component, name)
    return found


def _domains(uct: ctypes.CDLL, component: ctypes.c_void_p) -> list[bytes]:
    """Names of a component's memory domains."""
    asked = _ComponentAttributes(field_mask=NAME_FIELD | MD_COUNT_FIELD)
    _checked(uct.uct_component_query(component, ctypes.byref(asked)))
    names = ((ctypes.c_char * NAME_BYTES) * max(1, asked.md_count))()
    asked.field_mask = NAME_FIELD | MD_COUNT_FIELD | MD_FIELD
    asked.mds = ctypes.cast(names, ctypes.c_void_p)
    _checked(uct.uct_component_query(component, ctypes.byref(asked)))
    return [names[index].value for index in range(asked.md_count)]


def _of_domain(uct: ctypes.CDLL, component: ctypes.c_void_p, name: bytes) -> list[Transport]:
    config, domain = ctypes.c_void_p(), ctypes.c_void_p()
    _checked(uct.uct_md_config_read(component, None, None, ctypes.byref(config)))
    if uct.uct_md_open(component, ctypes.c_char_p(name), config, ctypes.byref(domain)):
        return []  # a device that can't be used, which is no news
    resources = ctypes.POINTER(_TransportResource)()
    count = ctypes.c_uint()
    _checked(uct.uct_md_query_tl_resources(domain, ctypes.byref(resources), ctypes.byref(count)))
    return [
        Transport(resources[index].transport.decode(), resources[index].device.decode())
        for index in range(count.value)
    ]


def _checked(status: int) -> None:
    if status:
        raise UcxError(f"UCX says {status}")


if __name__ == "__main__":
    raise SystemExit(main())
