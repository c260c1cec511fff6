"""Linux namespaces and mounts: a process without network, other processes and the machine's files."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

from eval.sandbox.isolation.syscalls import LIBC, MOUNT_SETATTR, NUMBERS, check, syscall, unshare
from eval.sandbox.view import WORK, View

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
SEPARATE = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS | NEWCGROUP

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE, MNT_DETACH = -100, 0x8000, 2

NOBODY = 65534
INODES = 4096
MOUNT_POINTS = ("/tmp", "/mnt", "/sys", "/proc")


class _MountAttributes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns"))


def leave_namespaces() -> None:
    """Move this process into new namespaces; its next child is the first process of the new PID namespace.

    A user namespace comes first, for root too. Root that may not make one (user.max_user_namespaces is 0) leaves the
    others directly. Raises OSError where the machine refuses both.
    """
    try:
        _leave_user_namespace()
    except OSError:
        if os.geteuid() != 0:
            raise
    unshare(SEPARATE)


def _leave_user_namespace() -> None:
    """Enter a user namespace where this process has uid 0; as root, uid 65534 outside is mapped as well."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 and _leave_with_two_ids():
        return
    if uid != 0:
        unshare(NEWUSER)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"0 {uid} 1")
    _write("/proc/self/gid_map", f"0 {gid} 1")


def _leave_with_two_ids() -> bool:
    """Enter a user namespace with root and nobody mapped, which only a process outside may write.

    Returns:
        Whether the maps are written; the namespace is entered in either case.
    """
    parent = os.getpid()
    ready, proceed = os.pipe()
    writer = os.fork()
    if writer == 0:
        try:
            os.close(proceed)
            os.read(ready, 1)
            for name in ("gid_map", "uid_map"):
                _write(f"/proc/{parent}/{name}", f"0 0 1\n{NOBODY} {NOBODY} 1")
            os._exit(0)
        finally:
            os._exit(1)
    os.close(ready)
    try:
        unshare(NEWUSER)
    finally:
        os.close(proceed)
        _, status = os.waitpid(writer, 0)
    return status == 0


def become_nobody() -> None:
    """Change to uid and gid 65534 where they are mapped and the process may; it stays what it is elsewhere."""
    changes: tuple[Callable[[], None], ...] = (
        lambda: os.setgroups([]),
        lambda: os.setresgid(*[NOBODY] * 3),
        lambda: os.setresuid(*[NOBODY] * 3),
    )
    for change in changes:
        try:
            change()
        except OSError:  # not mapped, not allowed to, or setgroups denied in the user namespace
            continue


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Mount a file system; an error is an OSError."""
    text = [None if part is None else os.fsencode(part) for part in (source, target, kind, data)]
    check(LIBC.mount(text[0], text[1], text[2], ctypes.c_ulong(flags), text[3]), f"mount {target}")


def mount_work_folder(size: int) -> None:
    """Mount a writable tmpfs of `size` bytes at /tmp and go there. Raises OSError."""
    _tmpfs(WORK, size, "1777")
    os.chdir(WORK)


def _tmpfs(target: str, size: int, mode: str) -> None:
    mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},nr_inodes={INODES},mode={mode}")


def enter_view(view: View, writable_bytes: int) -> None:
    """Replace the root by a read-only one with the paths of `view` and a writable tmpfs at /tmp, and go there.

    Args:
        view: paths to show.
        writable_bytes: size of the tmpfs.

    Raises:
        OSError: a mount is refused.
    """
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    root = _mount_point(view)
    _tmpfs(root, 1 << 20, "755")
    os.mkdir(root + WORK)
    _tmpfs(root + WORK, writable_bytes, "1777")  # before paths of the view that lie below it
    for path in view.folders:
        _bind(path, root + path)
    for path in view.masks:
        _tmpfs(root + path, 1 << 20, "755")
    for path in view.packages:
        _bind(path, root + path)
    _set_attributes(root, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, AT_RECURSIVE)
    _set_attributes(root + WORK, 0, MOUNT_ATTR_RDONLY, 0)
    os.chdir(root)
    syscall(NUMBERS["pivot_root"], "pivot_root", b".", b".")
    check(LIBC.umount2(b".", MNT_DETACH), "umount2")
    os.chdir(WORK)


def _set_attributes(path: str, on: int, off: int, flags: int) -> None:
    """Call mount_setattr(2). Raises OSError."""
    attributes = _MountAttributes(on, off, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    syscall(MOUNT_SETATTR, "mount_setattr", AT_FDCWD, os.fsencode(path), flags, ctypes.byref(attributes), size)


def _mount_point(view: View) -> str:
    """Return a folder that no path of the view lies in: the new root hides it while it is built."""
    paths = [os.path.realpath(path) + "/" for path in (*view.folders, *view.packages)]
    for folder in MOUNT_POINTS:
        if os.path.isdir(folder) and not any(path.startswith(folder + "/") for path in paths):
            return folder
    raise OSError(f"none of {', '.join(MOUNT_POINTS)} is free as a mount point")


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(source, target, None, MS_BIND | MS_REC)
