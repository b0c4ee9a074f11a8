"""Extractors for tests whose features can be worked out by hand, and frames to give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import onnx
import onnx.helper
from numpy.typing import NDArray

from hrpro.clients.cameras.manifest import ExtractorManifest, write_manifest

OPSET = 18


def mean_over(path: Path, layout: str, sizes: dict[str, Any]) -> Path:
    """A network (N, C): the mean of each channel over all other axes but the batch."""
    shape = [sizes.get(axis, axis) for axis in layout]
    axes = [number for number, axis in enumerate(layout) if axis not in "NC"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("ReduceMean", ["images", "axes"], ["features"], keepdims=0)],
        "mean",
        [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.array(axes, np.int64), "axes")],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=9
    )
    onnx.save(model, path)
    return path


def network(file: str = "mean.onnx", **changes: Any) -> dict[str, Any]:
    """The mean colour of the frames 0, 5 and 10, in 0..1."""
    return {
        "file": file,
        "frames": (0, 5, 10),
        "layout": "NCHW",
        "mean": (0.0, 0.0, 0.0),
        "std": (255.0, 255.0, 255.0),
        "features": 3,
        "pooling": "mean",
        **changes,
    }


def write_extractor(folder: Path, *networks: dict[str, Any], **changes: Any) -> Path:
    """An extractor of these networks (default: `network()`), whose files are made as needed."""
    folder.mkdir(parents=True, exist_ok=True)
    given = networks or (network(),)
    for each in given:
        if not (folder / each["file"]).exists():
            channels = 2 if each.get("flow") else 3
            mean_over(folder / each["file"], each["layout"], {"C": channels})
    doubled = {"mean_and_difference": 2}
    content = {
        "schema_version": 1,
        "name": "tiny",
        "frames_per_s": 25.0,
        "snippet_frames": 16,
        "feature_dim": sum(each["features"] * doubled.get(each["pooling"], 1) for each in given),
        "height": 8,
        "width": 8,
        "short_side": 8,
        "networks": given,
        "files": {each["file"]: "" for each in given},
        **changes,
    }
    write_manifest(folder, ExtractorManifest.model_validate(content))
    return folder


def plain_frame(height: int, width: int, *rgb: int) -> av.VideoFrame:
    """A frame of one colour."""
    image = np.broadcast_to(np.array(rgb, np.uint8), (height, width, 3))
    return frame_of(np.ascontiguousarray(image))


def frame_of(image: NDArray[np.uint8]) -> av.VideoFrame:
    """An RGB image (H, W, 3) as a decoder would give it."""
    return av.VideoFrame.from_ndarray(image, format="rgb24")
