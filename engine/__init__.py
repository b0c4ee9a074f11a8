"""The live half of HR-Pro Stream: snippets in, action events out.

Nothing is imported here, so that clients can use `hrpro.engine.protocol` and
`hrpro.engine.timebase` without loading anything of the engine itself.
"""
