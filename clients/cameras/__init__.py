"""Cameras and videos: frames, feature extractors, live streams. Needs the extra `camera`."""
