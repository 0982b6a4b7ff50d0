"""Read a video file as upright RGB frames with their times.

What is opened is restricted to single files of formats that carry their own pixels: a playlist from outside would be a
way to read other files and addresses.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opensan.errors import UserError, install, reason
from opensan.images import MAX_PIXELS, ImageError, check_size

if TYPE_CHECKING:
    pass

FORMATS = (
    "3gp,apng,asf,avi,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,rm,wtv,"
    "yuv4mpegpipe"
)
"""FFmpeg's names of the formats that are opened."""

SHORT_WAY = 8
"""Number of frames: times that go back by less mean disordered frames, by more another recording."""

_TIME = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")

MOST_SHORTFALL = 0.5
"""Seconds by which a video may end before its file's length without a warning."""


@dataclass(frozen=True)
class Frame:
    """A frame of a clip."""

    number: int
    """Number of the frame, from 0, counting all frames of the clip."""
    seconds: float
    """Time in seconds since the first frame."""
    image: np.ndarray = field(repr=False)
    """[H0, W0, 3] uint8 RGB, upright."""
    pts: int
    """Time at which it is shown, in units of the clip's `time_base`: from 0 on, strictly ascending."""
    duration: int
    """Time until the next frame, in the same units."""
    sound: "list[Any]" = field(repr=False, default_factory=list)
    """Packets of sound between the frame before and this one, as stored."""


class VideoReader:
    """A video file, open for reading.

        with VideoReader("street.mp4") as clip:
            for frame in clip.frames():
                print(frame.seconds, frame.image.shape)

    Raises ValueError, one line: PyAV is missing, or the file can't be read, isn't a video, or has frames of more than
    `max_pixels` pixels (known before one is decoded).
    """

    def __init__(self, path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS) -> None:
        av = pyav()
        self.path = Path(path)
        if not self.path.is_file():
            raise ImageError(f"{self.path}: {'not a file' if self.path.exists() else 'does not exist'}")
        self.stat = self.path.stat()
        """State of the file before it was opened, so that the next run notices a replacement."""
        try:
            # "file:" keeps FFmpeg from reading a name as an address.
            self._container = av.open(
                f"file:{self.path.absolute()}", options={"protocol_whitelist": "file", "format_whitelist": FORMATS}
            )
        except (av.FFmpegError, OSError) as error:
            raise ImageError(f"{self.path}: not a video that can be read ({reason(error)})") from None
        try:
            self._open_streams(max_pixels)
        except BaseException:
            self._container.close()
            raise
        self.shift = 0
        """Offset that was added to the file's times, so that the first is 0; in units of `time_base`."""
        self.damaged = 0
        """Number of pieces of the file that could not be decoded so far."""
        self.ends_early: str | None = None
        """Set once the frames are read: a warning if they end before the file's length."""
        self.sound_after: list[Any] = []
        """The sound after the last frame, once the frames are read."""

    def _open_streams(self, max_pixels: int) -> None:
        av = pyav()
        cover = av.stream.Disposition.attached_pic  # the cover picture of a song
        pictures = [stream for stream in self._container.streams.video if not stream.disposition & cover]
        if not pictures:
            raise ImageError(f"{self.path}: has no video in it")
        self._video = max(pictures, key=_area)  # the largest: others are previews
        if self._video.codec_context is None:
            raise ImageError(f"{self.path}: its video is of a kind that can't be decoded")
        self._max_pixels = max_pixels
        context = self._video.codec_context
        if context.width and context.height:
            check_size(context.height, context.width, str(self.path), max_pixels)
        # A frame may be larger than the header says. FFmpeg counts padding, so its limit is wider; `_upright` is exact.
        context.options = {"max_pixels": str(2 * max_pixels + (1 << 16))}
        context.thread_type = "AUTO"
        sounds = [stream for stream in self._container.streams.audio if stream.codec_context is not None]
        self.sound: Any | None = sounds[0] if sounds else None
        """The sound track; None without one."""
        self.time_base: Fraction = self._video.time_base or Fraction(1, 1000)
        """Seconds of one unit of the frames' times."""
        self.rate: Fraction = self._video.average_rate or self._video.guessed_rate or Fraction(25)
        """Average number of frames a second."""
        self.pixel_aspect: Fraction = self._video.sample_aspect_ratio or Fraction(1)
        """Aspect ratio of a stored pixel, width to height."""

    @property
    def frame_count(self) -> int | None:
        """Number of frames by the file's header or length, if known."""
        if self._video.frames:
            return self._video.frames
        if self._video.duration:
            return max(1, round(self._video.duration * self.time_base * self.rate))
        if self._container.duration:
            return max(1, round(self._container.duration / 1_000_000 * self.rate))
        return None

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._container.close()

    def frames(self, every: int = 1) -> Iterator[Frame]:
        """Yield each `every`-th frame, from the first on; can be read once.

        What can't be decoded is left out and counted in `damaged`. Raises ImageError, one line, if there is no frame
        at all, one is too large, or their size changes.
        """
        sound: list[Any] = []
        clock = _Clock(max(1, round(1 / (self.rate * self.time_base))))
        size: tuple[int, int] | None = None
        waiting = None
        for number, picture in enumerate(self._pictures(sound)):
            pts = clock.tell(picture)
            if number == 0:
                self.shift = clock.shift
            if number % every == 0:
                if waiting is not None:
                    yield replace(waiting, duration=pts - waiting.pts)
                image = self._upright(picture, number, size)
                size = image.shape[:2]
                waiting = Frame(number, float(pts * self.time_base), image, pts, 0, sound[:])
                sound.clear()
        if waiting is None:
            raise ImageError(f"{self.path}: no frame of it can be decoded")
        yield replace(waiting, duration=clock.end - waiting.pts)
        self.sound_after = sound
        if clock.jumps == 0:  # after a jump back, the file's own length is meaningless
            self.ends_early = self._shortfall(
                float(clock.end * self.time_base), float((clock.end - clock.shift) * self.time_base)
            )

    def _shortfall(self, length: float, end: float) -> str | None:
        """Return a warning if the frames end much before the video's length in the file.

        `length` (seconds) is that of the frames, and `end` when the last one ends, by the file's own clock, which some
        files mean.
        """
        promised = self._promised_seconds()
        if promised - max(length, end) < MOST_SHORTFALL + 1 / self.rate:
            return None
        return f"the frames end after {length:.1f} s, the file's length is {promised:.1f} s"

    def _promised_seconds(self) -> float:
        """Return the video's length in the file; 0 if it has only that of all tracks together."""
        if self._video.duration:
            return float(self._video.duration * self.time_base)
        if duration := _TIME.match(self._video.metadata.get("DURATION", "")):  # Matroska's
            hours, minutes, seconds = map(float, duration.groups())
            return 3600 * hours + 60 * minutes + seconds
        alone = len(self._container.streams) == 1  # sound may be longer
        return (self._container.duration or 0) / 1_000_000 if alone else 0.0

    def _pictures(self, sound: list[Any]) -> Iterator[Any]:
        """Yield the frames as FFmpeg decodes them; packets of sound are added to `sound` meanwhile."""
        av = pyav()
        packets = self._container.demux([self._video] + ([self.sound] if self.sound else []))
        while True:
            try:
                packet = next(packets, None)
            except (av.FFmpegError, OSError):
                self.damaged += 1  # the file ends in the middle
                return
            if packet is None:
                return
            if packet.stream is not self._video:
                if packet.dts is not None:
                    sound.append(packet)
                continue
            try:
                pictures = packet.decode()
            except av.FFmpegError:
                self.damaged += 1
                continue
            yield from pictures

    def _upright(self, picture: Any, number: int, size: tuple[int, int] | None) -> np.ndarray:
        if size is None:
            check_size(picture.height, picture.width, str(self.path), self._max_pixels)
        a, b, c, d = _display_matrix(picture)
        image = picture.to_ndarray(format="rgb24")
        if turned := abs(b) + abs(c) > abs(a) + abs(d):
            image, a, d = image.swapaxes(0, 1), c, b
        image = np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
        if number == 0 and turned:
            self.pixel_aspect = 1 / self.pixel_aspect
        if size is not None and image.shape[:2] != size:
            raise ImageError(
                f"{self.path}: frame {number} is {image.shape[1]} x {image.shape[0]} pixels, those before are "
                f"{size[1]} x {size[0]}: cut the video where its size changes"
            )
        return image


class _Clock:
    """Computes frames' times from the file's, correct or not: from 0 on, strictly ascending."""

    def __init__(self, step: int) -> None:
        """`step` is the usual time between frames, in the units of all times here."""
        self._step = step
        self._last: int | None = None
        self.shift = 0
        """Offset that is added to the file's times."""
        self.jumps = 0
        """Number of times that they went back."""
        self.end = 0
        """Time at which the last frame ends."""

    def tell(self, picture: Any) -> int:
        """Return the time of the next frame."""
        file_time = picture.pts if picture.pts is not None else picture.dts
        last = self._last
        if last is None:
            now = 0
            self.shift = 0 if file_time is None else -file_time
        elif file_time is None:
            now = last + self._step
        elif file_time + self.shift > last:
            now = file_time + self.shift
        elif last - file_time - self.shift < SHORT_WAY * self._step:  # a repeated time, or disordered frames
            now = last + 1
        else:  # a second recording, joined to the first: times continue from there
            now = last + self._step
            self.shift = now - file_time
            self.jumps += 1
        self._last = now
        self.end = now + (picture.duration or self._step)
        return now


def _area(stream: Any) -> int:
    """Return the number of pixels of a track's frames."""
    context = stream.codec_context
    return 0 if context is None else context.width * context.height


def _display_matrix(picture: Any) -> tuple[int, int, int, int]:
    """Return a frame's rotation (a, b, c, d): column x, row y are shown at column a x + c y, row b x + d y."""
    try:
        data = picture.side_data[pyav().sidedata.sidedata.Type.DISPLAYMATRIX]
    except KeyError:
        return (1, 0, 0, 1)
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), dtype=np.int32).tolist()
    return (a, b, c, d)


def pyav() -> Any:
    """Import `av`. Raises UserError, one line, if it is not installed."""
    try:
        import av
    except ImportError:
        raise UserError(f"videos need PyAV: {install('video')}") from None
    return av
