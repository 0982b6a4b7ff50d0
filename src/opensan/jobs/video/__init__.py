"""Segment videos, frame by frame, with the same words.

reader   the video that is read
writer   the overlay video that is written: frames under their words' colours, a legend, the clip's own sound
steady   averages over time, so that labels flicker less
job      a whole clip to label frames, a table and an overlay video, in constant memory; resumable

Reading and writing needs PyAV (the extra `video`).
"""

from opensan.jobs.video.job import Done, VideoRun
from opensan.jobs.video.reader import Frame, VideoReader

__all__ = ["Done", "Frame", "VideoReader", "VideoRun"]
