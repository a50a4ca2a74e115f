"""One run at a time in a folder: a lock that network filesystems keep and that a crash does not leave shut.

The lock is a file that only one process can make (by a link, which works on NFS, where `flock` may not). It names its
owner, who touches it every few seconds: on the owner's machine a dead owner is seen at once, elsewhere by a lock
that has not been touched for a while.
"""

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from laver_mcore.config.errors import ConfigError

NAME = "run.lock"
TOUCHED_EVERY = 10.0
"""Seconds."""
STALE_AFTER = 90.0
"""Seconds without a touch after which another machine's owner counts as dead."""


class RunLock:
    """Context that owns a folder; `ConfigError` where another run that lives does."""

    def __init__(self, folder: str | Path) -> None:
        self._file = Path(folder) / NAME
        self._stop = threading.Event()
        self._mine: dict[str, Any] = {}

    def __enter__(self) -> "RunLock":
        self._file.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(100):
            if self._create():
                threading.Thread(target=self._touch, name="run-lock", daemon=True).start()
                return self
            text = _text(self._file)
            if text is None:
                continue  # its owner has just left
            owner = _owner(text)
            if owner is not None and _lives(owner, self._file):
                raise ConfigError(
                    f"{self._file.parent} is being written by process {owner.get('pid')} on {owner.get('host')} "
                    f"since {owner.get('since')}; wait for it, or choose another --save"
                )
            self._break(text)
        raise ConfigError(f"{self._file}: cannot be taken; choose another --save")

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if _owner(_text(self._file) or "") == self._mine:
            with contextlib.suppress(OSError):
                self._file.unlink()

    def _create(self) -> bool:
        self._mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        # A link, so that the lock is there with its owner's name in it or not at all.
        aside = self._file.with_name(f".{NAME}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}")
        try:
            aside.write_text(json.dumps(self._mine), encoding="utf-8")
            os.link(aside, self._file)
        except FileExistsError:
            return False
        except OSError as error:
            raise ConfigError(
                f"{self._file}: cannot be written ({error.strerror}); choose another --save"
            ) from None
        finally:
            aside.unlink(missing_ok=True)
        return True

    def _break(self, text: str) -> None:
        """Take a dead owner's lock away; one process at a time may, so that it is not a new owner's by then."""
        breaking = self._file.with_name(f".{NAME}.breaking")
        with contextlib.suppress(OSError):
            if time.time() - breaking.stat().st_mtime > STALE_AFTER:
                breaking.unlink()  # whoever was at it has died
        try:
            os.close(os.open(breaking, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except OSError:
            time.sleep(0.05)
            return
        with contextlib.suppress(OSError):
            if _text(self._file) == text:
                self._file.unlink()
        breaking.unlink(missing_ok=True)

    def _touch(self) -> None:
        while not self._stop.wait(TOUCHED_EVERY):
            with contextlib.suppress(OSError):
                os.utime(self._file)


def _text(file: Path) -> str | None:
    """What stands in it; None where it is gone."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _owner(text: str) -> dict[str, Any] | None:
    """Who owns it; None where that is not to be read."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _lives(owner: dict[str, Any], file: Path) -> bool:
    if owner.get("host") == socket.gethostname():
        return owner.get("started") is not None and _started(owner.get("pid")) == owner.get("started")
    try:
        return time.time() - file.stat().st_mtime < STALE_AFTER
    except OSError:
        return False


def _started(pid: Any) -> str | None:
    """When a process of this machine started, `boot:ticks` in the kernel's count; None where there is none."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except (OSError, TypeError, ValueError):
        return None
    return None if fields[0] == "Z" else f"{boot}:{fields[19]}"
