"""Claims: what is made once for everybody is made by one process, on whatever machine, and the others wait.

PATH.claim    made by one process alone, grows every RENEW_SECONDS while it works on PATH, and is removed at the end

File locks do not reach other machines on every network file system, so nothing here needs them. Making a claim also
has such a system look at the folder anew, so that what others have published is seen. Clocks of two machines are never
compared: a claim is of a dead process if it has not grown while another one watched it for DEAD_SECONDS. A process that
was only suspended may then work beside its successor. Both make the same, and publish it by a rename.
"""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator

RENEW_SECONDS = 5.0
DEAD_SECONDS = 30.0
POLL_SECONDS = 0.5


@contextlib.contextmanager
def claim(path: str) -> Iterator[None]:
    """Claims work on a path within the block, as soon as no other process does. Look then whether it is done already.

    Where no claim can be written, such as on a full disk, the block begins at once.
    """
    place, token = f"{path}.claim", f"process {os.getpid()} of {os.uname().nodename}, {uuid.uuid4().hex}\n".encode()
    ended = threading.Event()
    if held := _take(place, token):
        threading.Thread(target=_renew, args=(place, ended), name="claim", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if held and (_read(place) or b"").startswith(token):
            with contextlib.suppress(OSError):
                os.unlink(place)


def _take(place: str, token: bytes) -> bool:
    """Returns True as soon as this process has the claim, False if it cannot be written."""
    seen, since, pause = None, time.monotonic(), POLL_SECONDS / 16
    while True:
        try:
            with open(place, "xb") as file:  # of all machines one can make a new file
                file.write(token)
            return True
        except FileExistsError:
            pass
        except OSError:
            return False
        if (found := _read(place)) != seen:
            seen, since = found, time.monotonic()
        elif time.monotonic() - since > DEAD_SECONDS and not _remove(place, found, token):
            return False
        time.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS)


def _remove(place: str, found: bytes | None, token: bytes) -> bool:
    """Removes a claim of which nothing has been seen but `found`: of all who have watched it one can rename it."""
    aside = f"{place}.{token[-33:-1].decode()}.tmp"
    try:
        os.rename(place, aside)
        if _read(aside) == found:
            os.unlink(aside)
        else:  # another process was faster, and this is its own claim
            os.rename(aside, place)
    except FileNotFoundError:
        pass
    except OSError:  # another user's
        return False
    return True


def _renew(place: str, ended: threading.Event) -> None:
    while not ended.wait(RENEW_SECONDS):
        with contextlib.suppress(OSError), open(place, "r+b") as file:  # never makes it anew
            file.seek(0, os.SEEK_END)
            file.write(b".")


def _read(place: str) -> bytes | None:
    # Opening by name asks a network file system for the newest contents.
    with contextlib.suppress(OSError), open(place, "rb") as file:
        return file.read()
    return None
