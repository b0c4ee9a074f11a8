"""The MQTT sink of `hrpro watch`; needs the extra `mqtt`."""

from __future__ import annotations

import logging
import queue
import ssl
import sys
import threading
import time
import unicodedata
from urllib.parse import SplitResult, unquote

from paho.mqtt import client as mqtt
from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from hrpro.clients.sinks import LONGEST_PAUSE_S, split_url
from hrpro.engine.protocol import HrproError, Publication, StreamNotice

_log = logging.getLogger(__name__)

_START_S = 10.0  # for the broker to be there at the start
_GOODBYE_S = 5.0  # for it to take `offline`
_PORTS = {"mqtt": 1883, "mqtts": 8883}  # mqtts: by TLS


class Mqtt:
    """Publishes with QoS 1 to a broker, and waits until it has it, however long that takes.

    Topics are <prefix>/<stream>/event/<label> and <prefix>/<stream>/stream, whose last message the
    broker retains, and <prefix>/<stream>/final/<label>. <prefix>/availability, retained too, is
    `online` or `offline`. Raises HrproError where the broker does not let it in, or has a
    certificate of nobody whom the system, or SSL_CERT_FILE, trusts.
    """

    def __init__(self, url: str) -> None:
        parts = split_url(url, "--mqtt", tuple(_PORTS))
        host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        self._prefix = _prefix(parts)
        self._where = f"{host}:{port}"
        self._taken: queue.SimpleQueue[int] = queue.SimpleQueue()  # the messages' own numbers
        self._refused = ""
        self._heard = threading.Event()  # of the broker, or that it is not there
        self._is_away = False
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2)
        if parts.scheme == "mqtts":
            self._client.tls_set_context(ssl.create_default_context())
        self._client.username_pw_set(*_credentials(parts))
        self._client.will_set(self._availability, "offline", qos=1, retain=True)
        self._client.reconnect_delay_set(1, int(LONGEST_PAUSE_S))
        self._client.on_connect = self._on_connect
        self._client.on_connect_fail = self._on_connect_fail
        self._client.on_disconnect = self._on_disconnect
        self._client.on_publish = lambda _client, _data, number, *_: self._taken.put(number)
        self._client.connect_async(host, port)
        self._client.loop_start()
        self._heard.wait(_START_S)
        self._check_refused()

    @property
    def _availability(self) -> str:
        return f"{self._prefix}/availability"

    def deliver(self, publication: Publication, line: str, /) -> None:
        """Taken by the broker."""
        topic = f"{self._prefix}/{publication.stream}/{publication.TYPE}"
        if not isinstance(publication, StreamNotice):
            topic += "/" + _level(publication.label)
        self._publish(topic, line, retain=publication.TYPE != "final")

    def _publish(
        self, topic: str, payload: str, retain: bool, until_s: float | None = None
    ) -> None:
        number = self._client.publish(topic, payload, qos=1, retain=retain).mid
        while until_s is None or time.monotonic() < until_s:
            self._check_refused()
            try:
                if self._taken.get(timeout=0.5) == number:
                    return
            except queue.Empty:
                pass

    def _check_refused(self) -> None:
        if self._refused:
            raise HrproError(f"MQTT broker at {self._where}: {self._refused}")

    def close(self) -> None:
        """Says that it leaves, if the broker is there; otherwise the broker does."""
        try:
            if self._client.is_connected():
                until_s = time.monotonic() + _GOODBYE_S
                self._publish(self._availability, "offline", retain=True, until_s=until_s)
        finally:
            self._client.disconnect()
            self._client.loop_stop()

    # By the client's own thread:

    def _on_connect(
        self,
        client: Client,
        _data: object,
        _flags: ConnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            if reason.getName() in ("Not authorized", "Bad user name or password"):
                self._refused = f"{reason}"
            self._heard.set()
            return
        if self._is_away:
            _log.warning("MQTT broker at %s: there again", self._where)
        self._is_away = False
        client.publish(self._availability, "online", qos=1, retain=True)
        self._heard.set()

    def _on_connect_fail(self, _client: Client, _data: object) -> None:
        error = sys.exception()  # which the client has caught, and does not hand on
        if isinstance(error, ssl.SSLCertVerificationError):
            self._refused = f"its certificate is not trusted: {error.verify_message}"
        self._on_away(f"does not answer: {error}")

    def _on_disconnect(
        self,
        _client: Client,
        _data: object,
        _flags: DisconnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            self._on_away(f"{reason}")

    def _on_away(self, reason: str) -> None:
        if not self._is_away and not self._refused:
            _log.warning("MQTT broker at %s: %s; trying again", self._where, reason)
        self._is_away = True
        self._heard.set()


def _prefix(parts: SplitResult) -> str:
    """What topics begin with."""
    prefix = unquote(parts.path.strip("/")) or "hrpro"
    # Brokers close the line of who publishes to a topic with one of these.
    has_special = any(each in "+#" or unicodedata.category(each) == "Cc" for each in prefix)
    if has_special or parts.query or parts.fragment:
        raise HrproError(
            "--mqtt: expected a prefix of topics behind the host, without +, # and control "
            f"characters, and %3F for a question mark, came {prefix!r}"
        )
    return prefix


def _credentials(parts: SplitResult) -> tuple[str | None, str | None]:
    user, password = parts.username, parts.password
    return (user and unquote(user)), (password and unquote(password))


def _level(label: str) -> str:
    """A label as one level of a topic, where these have a meaning of their own."""
    return label.replace("+", "_").replace("#", "_")
