"""Replace files and folders by new ones: all of them or none, without losing an old one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

# renameat2's arguments: relative to the working directory; exchange.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

# How long to wait for another writer, which needs only two renames.
_SECONDS = 10.0


@contextlib.contextmanager
def replacing(*files: Path, force: bool = False) -> Iterator[list[Path]]:
    """Yield temporary names beside `files`, whose files replace `files` when the block ends without an exception.

    Until then, and if it fails, the old files are unchanged and nothing is left behind. A killed process leaves
    `leftovers`. Several files are replaced all or none, unless the process is killed between two of them. A link among
    `files` is replaced, not the file it points to. Missing folders are created. Modes are those of the old files, or of
    any new file.

    Raises:
        FileExistsError: one of the files exists and `force` is False; or it is not a regular file.
        OSError: a file cannot be written; the error names it.
    """

    def check() -> None:
        for file in files:
            if os.path.lexists(file) and not force:
                raise FileExistsError(f"{file}: exists already; force=True overwrites it")
            if file.is_dir():
                raise IsADirectoryError(f"{file}: is a folder, expected a file")
            if file.exists() and not file.is_file():
                raise FileExistsError(f"{file}: is not a regular file (a device, for example) and is not replaced")

    check()
    places: dict[Path, Path] = {}
    modes: dict[Path, int] = {}
    try:
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = _beside(file)
            places[temporary] = file
            if file.is_file():
                modes[temporary] = file.stat().st_mode & 0o777
            mode = modes.get(temporary, 0o666) | 0o200
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        yield list(places)
        for temporary, mode in modes.items():
            os.chmod(temporary, mode)
        _to_disk(places)
        with contextlib.ExitStack() as stack:
            for folder in sorted({file.parent for file in files}):
                stack.enter_context(_alone(folder))
            check()  # once more: another writer may have created them
            _take_places(places)
    except OSError as error:
        _rename(error, places)
        raise
    finally:
        for temporary in places:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path, mode: int = 0o777, force: bool = False) -> Iterator[Path]:
    """Yield a new folder beside `folder`. It replaces `folder` when the block ends without an exception.

    The old folder is then removed. If the two cannot be exchanged in one step, and the old one cannot be restored after
    a failure, the exception says where it is. The new folder gives nobody a permission that `mode` does not.

    Raises:
        FileExistsError: `folder` exists when the block ends and `force` is False.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = _beside(folder)
    new.mkdir(mode | 0o700)
    made = os.lstat(new)
    try:
        yield new
        _to_disk(file for file in new.rglob("*") if file.is_file())
        if os.path.lexists(folder) and not force:
            raise FileExistsError(f"{folder}: exists already; force=True replaces it, if it is a model's folder")
        _take_places({new: folder})
    except BaseException as error:
        if isinstance(error, OSError):
            _rename(error, {new: folder})
        if _is(new, made):  # otherwise it is the old folder, and the only copy
            _remove(new)
        raise
    _remove(new)


def leftovers(place: Path) -> list[str]:
    """Return a sentence for each file or folder beside `place` that a killed process has left."""
    start = f".{place.name[:40]}."
    if not place.parent.is_dir():
        return []
    names = sorted(each.name for each in place.parent.iterdir()
                   if each.name.startswith(start) and each.name.endswith(".tmp"))  # fmt: skip
    what = "it may be removed" if os.path.lexists(place) else f"it may be the former {place}"
    return [f"{place.parent / name}: left by a killed process, unless one is running: {what}" for name in names]


def exchange(one: Path, other: Path) -> None:
    """Exchange two files or folders of one file system: in one step if the system can, else by renaming.

    An exception leaves both unchanged.

    Raises:
        OSError: they cannot be exchanged. If `other` could not be restored, the message says where it is.
    """
    if _exchanged_at_once(one, other):
        return
    spare = _beside(other)
    try:
        if not other.is_dir():
            with contextlib.suppress(OSError, NotImplementedError):
                os.link(other, spare, follow_symlinks=False)  # so that the file exists at every moment
        if not os.path.lexists(spare):
            os.replace(other, spare)
        os.replace(one, other)
        os.replace(spare, one)
    except BaseException as error:
        try:
            if os.path.lexists(spare):
                if not os.path.lexists(one):
                    os.replace(other, one)
                os.replace(spare, other)
            if os.path.lexists(spare) and os.path.samestat(os.lstat(spare), os.lstat(other)):
                spare.unlink()  # a rename leaves both if they are two names of one file
        except OSError as second:
            reason = f"{error or type(error).__name__}; then {second}"
            raise OSError(f"{other}: could not be restored ({reason}); its former content is in {spare}") from error
        raise


def _exchanged_at_once(one: Path, other: Path) -> bool:
    """True if the system has exchanged them in one step. If False, nothing has changed."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0)


def _take_places(places: dict[Path, Path]) -> None:
    """Move each temporary file or folder into place, and the old one to the temporary name: all or none."""
    made = [(temporary, place, os.lstat(temporary)) for temporary, place in places.items()]
    try:
        for temporary, place, _ in made:
            if os.path.lexists(place):
                exchange(temporary, place)
            else:
                os.rename(temporary, place)
    except BaseException:
        for temporary, place, new in reversed(made):
            if _is(place, new):
                if os.path.lexists(temporary):
                    exchange(place, temporary)
                else:
                    os.rename(place, temporary)
        raise


def _is(place: Path, status: os.stat_result) -> bool:
    return os.path.lexists(place) and os.path.samestat(os.lstat(place), status)


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _beside(place: Path) -> Path:
    """A new name in the same folder that `leftovers` recognises and that is not too long for the file system."""
    return place.with_name(f".{place.name[:40]}.{secrets.token_hex(4)}.tmp")


def _to_disk(written: Iterable[Path]) -> None:
    for file in written:
        with file.open("rb") as content:
            try:
                os.fsync(content.fileno())
            except OSError as error:
                error.filename = str(file)
                raise


def _rename(error: OSError, places: dict[Path, Path]) -> None:
    """Make an error name the file that was to be written, not the temporary one."""
    for temporary, place in places.items():
        for attribute in ("filename", "filename2"):
            name = getattr(error, attribute)
            if isinstance(name, str | bytes | os.PathLike) and Path(os.fsdecode(name)).is_relative_to(temporary):
                inside = Path(os.fsdecode(name)).relative_to(temporary)
                setattr(error, attribute, str(place / inside))
    if error.errno is not None and error.filename is None:
        error.filename = str(next(iter(places.values()), None))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other writers of this package out of a folder, if the system has locks and the folder can be read."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        until = time.monotonic() + _SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(f"{folder}: another process has held its lock for {_SECONDS:g} s") from None
                time.sleep(0.005)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(handle)
