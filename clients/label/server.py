"""`hrpro label` as it runs: on this machine alone, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from hrpro.clients import web
from hrpro.clients.label.app import Labelling, create_app
from hrpro.clients.label.classes import ClassFile
from hrpro.clients.label.point_file import PointFile, locked, point_file_path
from hrpro.clients.label.videos import open_videos
from hrpro.training.annotations import point_rates
from hrpro.training.data_config import DataConfig
from hrpro.training.feature_source import check_clock

# Pages that do not go when they are asked to: a browser keeps its connections.
_GOODBYE_S = 1


def serve(
    paths: Sequence[Path],
    folder: Path,
    config: DataConfig,
    classes: Sequence[str],
    port: int,
    ready: Callable[[str, Labelling], None],
) -> None:
    """Serve the page until the program is told to stop; ``ready`` is told its URL.

    Raises HrproError for what does not fit: videos, points, classes, or the port.
    """
    stopping = threading.Event()
    videos = open_videos(paths, stopping)
    check_clock(folder, config)
    path = point_file_path(folder, config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(path))
        listener, url = web.listening("127.0.0.1", port, "--port")
        stack.enter_context(listener)
        points = PointFile(path, point_rates(folder, [each.name for each in videos], config))
        labelling = Labelling(videos, points, ClassFile(folder, config, points.counts(), classes))
        port = listener.getsockname()[1]
        token = secrets.token_urlsafe(18)
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(labelling, token, port),
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=_GOODBYE_S,
            )
        )
        try:
            ready(f"{url}/{token}/", labelling)
            server.run(sockets=[listener])
        finally:
            stopping.set()
            for video in videos:
                video.join()
