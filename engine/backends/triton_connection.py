"""One gRPC connection to a Triton server: calls that always end, and what they raise."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from hrpro.engine.inference import BackendError

_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Otherwise a new channel waits as long as the one before would have, before it connects.
    ("grpc.use_local_subchannel_pool", 1),
]
_CONTENTS_TAG = bytes([7 << 3 | 2])  # field raw_input_contents, of a length that follows
# gRPC ends a call at its deadline. Should it ever not, the call ends here, so much later.
_GRACE_S = 1.0


class CallError(BackendError):
    """A call that failed; ``answered`` if it was the server that said so."""

    def __init__(self, reason: str, answered: bool) -> None:
        super().__init__(reason)
        self.answered = answered


class Connection:
    """A channel to the server, closed when nobody has it any more, and what is known of the server.

    ``version`` of the model has the bundle; regions of shared memory are ``registered`` by name.
    """

    def __init__(self, address: str, deadline_s: float) -> None:
        channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = GRPCInferenceServiceStub(channel)
        self._infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )
        self._deadline_s = deadline_s
        self._closing = weakref.finalize(self, channel.close)
        self._closing.atexit = False
        self.version = ""
        self.answered_s = -float("inf")
        self.registered: set[str] = set()
        self.shares_memory = True

    def call(self, method: str, request: Any) -> Any:
        """The answer to a request. Raises CallError, soon after the deadline at the latest."""
        return self._answer(getattr(self._stub, method), request)

    def infer(self, request: Any, contents: Sequence[NDArray[Any]]) -> Any:
        """Likewise to a ModelInferRequest, with the contents of its inputs."""
        return self._answer(self._infer, _with_contents(request, contents))

    def _answer(self, method: Any, request: Any) -> Any:
        expected = f"expected an answer in triton.deadline_s {self._deadline_s:g}, got none"
        future = method.future(request, timeout=self._deadline_s)
        try:
            return future.result(self._deadline_s + _GRACE_S)
        except grpc.FutureTimeoutError:
            self._closing.detach()  # it would wait for the call to end
            raise CallError(f"{expected}, nor an error of gRPC", answered=False) from None
        except grpc.RpcError as error:
            code = error.code()
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise CallError(expected, answered=False) from None
            answered = code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            raise CallError(error.details() or str(code), answered) from None
        finally:
            del future  # it is the error itself, which has this frame


def _with_contents(request: Any, contents: Sequence[NDArray[Any]]) -> bytes:
    """Serialized, with raw_input_contents behind it: one copy, where protobuf makes three."""
    parts: list[bytes | memoryview] = [request.SerializeToString()]
    for array in contents:
        parts += [_CONTENTS_TAG, _varint(array.nbytes), np.ascontiguousarray(array).data]
    return b"".join(parts)


def _varint(number: int) -> bytes:
    """As protobuf has it: seven bits a byte, the lowest first."""
    found = []
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])
