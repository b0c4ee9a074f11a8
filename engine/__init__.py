"""The live half of HR-Pro Stream: snippets in, action events out.

Nothing of it is imported here, so that clients can use `hrpro.engine.protocol` and
`hrpro.engine.timebase` without loading anything of the engine itself.
"""

import os

# The packages of ONNX Runtime (1.31 and newer, on Linux, too) tell their maker about each session,
# unless this is set before they are loaded. Nothing of ours loads them without coming through here.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
