"""System shared memory between an engine and a Triton server on the same host.

A region has room for one batch and its answer. It is a file in /dev/shm, locked as long as its
engine lives, and registered with the server under the file's name:

    create -> register -> [ lend -> write -> infer -> read ] -> unregister -> remove

The server may still write into a region whose answer did not come: that one is retired, and goes
when the server says that it no longer uses it. What a killed engine left has no lock any more: the
next engine that asks for the same port retires it, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import secrets
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import DTypeLike, NDArray
from tritonclient.grpc import service_pb2
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from hrpro.engine.backends.triton_connection import CallError, Connection
from hrpro.engine.inference import BackendError

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where shm_open has its files
_ALIGNMENT = 64
# At the end a server is not waited for as long as while there is something to compute.
_LAST_DEADLINE_S = 1.0

_log = logging.getLogger(__name__)


class Region:
    """A locked file in shared memory. Raises OSError where there is no room for it."""

    def __init__(self, path: Path, file: int, size_bytes: int) -> None:
        self.name = path.name
        self.size_bytes = size_bytes
        self._path = path
        self._file = file
        self._memory = mmap.mmap(file, size_bytes) if size_bytes else None
        self._used_bytes = 0

    @classmethod
    def create(cls, prefix: str, size_bytes: int) -> Region:
        """A new one, all of whose memory is there: a write never finds that there is none."""
        path = SHARED_MEMORY / f"{prefix}{secrets.token_hex(8)}"
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.posix_fallocate(file, 0, size_bytes)
            return cls(path, file, size_bytes)
        except OSError:
            path.unlink(missing_ok=True)
            os.close(file)
            raise

    @classmethod
    def left(cls, prefix: str) -> Iterator[Region]:
        """Those of engines that are gone, locked by this one now."""
        for path in SHARED_MEMORY.glob(f"{prefix}*"):
            with contextlib.suppress(OSError):  # another user's, or gone meanwhile
                file = os.open(path, os.O_RDWR)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    os.close(file)
                else:
                    yield cls(path, file, 0)

    def empty(self) -> None:
        """All of it can be taken again."""
        self._used_bytes = 0

    def take(self, tensor: Any, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """The next part, where a tensor of a request lies or comes to lie."""
        assert self._memory is not None
        start, kind = self._used_bytes, np.dtype(dtype)
        array = np.ndarray(shape, kind, self._memory, start)
        self._used_bytes += padded_bytes(shape, kind)
        tensor.parameters["shared_memory_region"].string_param = self.name
        tensor.parameters["shared_memory_offset"].int64_param = start
        tensor.parameters["shared_memory_byte_size"].int64_param = array.nbytes
        return array

    def remove(self) -> None:
        """The memory is free once no array of it is left."""
        self._path.unlink(missing_ok=True)
        self.leave()

    def leave(self) -> None:
        """For a later engine to remove."""
        self._memory = None
        os.close(self._file)


def padded_bytes(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """What `Region.take` takes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class Regions:
    """As many regions as there are batches in flight. Safe to use from several threads.

    ``required``: a server that does not take them raises BackendError, in place of None and a line
    in the log.
    """

    def __init__(self, address: str, size_bytes: int, count: int, required: bool) -> None:
        self._prefix = f"hrpro-triton-{address.rsplit(':', 1)[-1]}-"
        self._address = address
        self._size_bytes = size_bytes
        self._required = required
        self._said = ""
        self._removing = threading.Lock()
        self._free: list[Region] = []
        self._retired = list(Region.left(self._prefix))
        self._most_retired = len(self._retired) + 2 * count
        self._all = {each.name: each for each in self._retired}
        weakref.finalize(self, _release, address, self._all)

    @contextlib.contextmanager
    def lent(self, connection: Connection) -> Iterator[Region | None]:
        """One to write a request into; None where the server does not take them."""
        if self._retired:
            self._remove_retired(connection)
        region = self._registered(connection)
        if region is None:
            yield None
            return
        region.empty()
        try:
            yield region
        except BaseException:
            self._retired.append(region)
            raise
        self._free.append(region)

    def _remove_retired(self, connection: Connection) -> None:
        with self._removing:
            for region in list(self._retired):
                try:
                    connection.call("SystemSharedMemoryUnregister", _by_name(region))
                except CallError as error:
                    if not error.answered:
                        raise
                    continue  # the server still uses it
                self._retired.remove(region)
                del self._all[region.name]
                region.remove()

    def _registered(self, connection: Connection) -> Region | None:
        if not connection.shares_memory:
            return None
        region = None
        try:
            region = self._new_or_free()
            _register(connection, region)
        except (OSError, CallError) as error:
            if region is not None:
                self._retired.append(region)
            if isinstance(error, CallError) and not error.answered:
                raise
            self._refused(connection, str(error))
            return None
        self._said = ""
        return region

    def _new_or_free(self) -> Region:
        try:
            return self._free.pop()
        except IndexError:
            if len(self._retired) > self._most_retired:
                raise OSError(f"the server still uses {len(self._retired)} regions") from None
            region = Region.create(self._prefix, self._size_bytes)
            self._all[region.name] = region
            return region

    def _refused(self, connection: Connection, reason: str) -> None:
        connection.shares_memory = False
        if self._required:
            raise BackendError(f"triton.shared_memory always: {reason}")
        if reason != self._said:
            self._said = reason
            _log.warning(
                "Triton at %s: windows go through gRPC, not through shared memory: %s",
                self._address, reason,
            )  # fmt: skip


def _register(connection: Connection, region: Region) -> None:
    if region.name in connection.registered:
        return
    request = service_pb2.SystemSharedMemoryRegisterRequest(
        name=region.name, key=f"/{region.name}", offset=0, byte_size=region.size_bytes
    )
    try:
        connection.call("SystemSharedMemoryRegister", request)
    except CallError as error:
        # Names are never used again: what the server has is this region.
        if "already in manager" not in str(error):
            raise
    connection.registered.add(region.name)


def _by_name(region: Region) -> Any:
    return service_pb2.SystemSharedMemoryUnregisterRequest(name=region.name)


def _release(address: str, regions: dict[str, Region]) -> None:
    """At the end of a backend, or of the process: where no thread can be started any more."""
    with grpc.insecure_channel(address) as channel:
        unregister = GRPCInferenceServiceStub(channel).SystemSharedMemoryUnregister
        for region in regions.values():
            try:
                unregister(_by_name(region), timeout=_LAST_DEADLINE_S)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    region.leave()
                    continue
            region.remove()
    regions.clear()
