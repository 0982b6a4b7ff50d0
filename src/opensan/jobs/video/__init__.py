"""Videos: each frame is a photograph, asked for the same words.

clip     the video that is read
film     the video that is written: frames under their words' colours, a legend, the clip's own sound
steady   regions that keep from flickering
run      a whole clip into label frames, a table and a film, in constant memory; resumable

Reading and writing needs PyAV (the extra `video`).
"""

from opensan.jobs.video.job import Done, VideoRun
from opensan.jobs.video.reader import Frame, VideoReader

__all__ = ["Done", "Frame", "VideoReader", "VideoRun"]
