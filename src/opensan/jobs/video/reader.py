"""A video file as frames: upright, in RGB, with the times they are shown at.

What is opened is restricted to single files of formats that carry their own pixels: a playlist from outside would be a
way to read other files and addresses.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opensan.errors import UserError, reason
from opensan.images import MAX_PIXELS, ImageError, check_size

if TYPE_CHECKING:
    import av

FORMATS = (
    "3gp,apng,asf,avi,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,rm,wtv,"
    "yuv4mpegpipe"
)
"""FFmpeg's names of what is opened."""

MOST_SHORTFALL = 0.5
"""Seconds: a video that ends so much before the file does is not worth a word."""


@dataclass(frozen=True)
class Frame:
    """A picture of a clip."""

    number: int
    """Counted from 0, all frames of the clip counted."""
    seconds: float
    """Since the first frame."""
    image: np.ndarray = field(repr=False)
    """[H0, W0, 3] uint8 RGB, upright."""
    pts: int
    """When it is shown, in units of the clip's `time_base`; strictly ascending."""
    duration: int
    """In the same units; 0 if the file does not say."""
    sound: "list[av.Packet]" = field(repr=False, default_factory=list)
    """What the file holds of the sound between the frame before and this one, as it is stored."""


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
        self.damaged = 0
        """Pieces of the file that could not be decoded, so far."""
        self.ends_early: str | None = None
        """Once the frames are read: when they end, if the file promises more."""
        self.sound_after: list[av.Packet] = []
        """The sound after the last frame, once the frames are read."""

    def _open_streams(self, max_pixels: int) -> None:
        av = pyav()
        cover = av.stream.Disposition.attached_pic  # of a song
        pictures = [stream for stream in self._container.streams.video if not stream.disposition & cover]
        if not pictures:
            raise ImageError(f"{self.path}: has no video in it")
        self._video = pictures[0]
        if self._video.codec_context is None:
            raise ImageError(f"{self.path}: its video is of a kind that can't be decoded")
        self._max_pixels = max_pixels
        context = self._video.codec_context
        if context.width and context.height:
            check_size(context.height, context.width, str(self.path), max_pixels)
        # A frame may be larger than the header says. FFmpeg counts padding too, so it gets room; `_upright` is exact.
        context.options = {"max_pixels": str(2 * max_pixels + (1 << 16))}
        context.thread_type = "AUTO"
        sounds = [stream for stream in self._container.streams.audio if stream.codec_context is not None]
        self.sound: av.AudioStream | None = sounds[0] if sounds else None
        """The sound that goes with it."""
        self.time_base: Fraction = self._video.time_base or Fraction(1, 1000)
        """Seconds of one unit of the frames' times."""
        self.rate: Fraction = self._video.average_rate or self._video.guessed_rate or Fraction(25)
        """Frames a second, on average."""
        self.pixel_aspect: Fraction = self._video.sample_aspect_ratio or Fraction(1)
        """Width of a stored pixel in its heights."""

    @property
    def frame_count(self) -> int | None:
        """How many frames the file says or seems to have, if that."""
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
        """Each `every`-th frame, from the first on; can be read once.

        What can't be decoded is left out and counted in `damaged`. Raises ImageError, one line, if there is no frame
        at all, one is too large, or their size changes.
        """
        sound: list[Any] = []
        number, first, last = 0, 0, -(1 << 62)
        size: tuple[int, int] | None = None
        for picture in self._pictures(sound):
            pts = self._when(picture, last)
            first = pts if number == 0 else first
            if number % every == 0:
                image = self._upright(picture, number, size)
                size = image.shape[:2]
                yield Frame(number, float((pts - first) * self.time_base), image, pts, picture.duration or 0, sound[:])
                sound.clear()
            number, last = number + 1, pts
        if number == 0:
            raise ImageError(f"{self.path}: no frame of it can be decoded")
        self.sound_after = sound
        self.ends_early = self._shortfall(float((last - first) * self.time_base))

    def _shortfall(self, found: float) -> str | None:
        """What is to be said if the last frame is shown much before the end that the file's header tells."""
        promised = float((self._container.duration or 0) / 1_000_000)
        if promised - found < MOST_SHORTFALL + 2 / self.rate:
            return None
        return f"the pictures end after {found:.1f} s, the file promises {promised:.1f} s"

    def _pictures(self, sound: list[Any]) -> Iterator[Any]:
        """The frames as FFmpeg gives them; packets of sound are added to `sound` on the way."""
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

    def _when(self, picture: Any, last: int) -> int:
        """The frame's time; after the one before's, whatever the file says."""
        pts = picture.pts if picture.pts is not None else picture.dts
        if pts is None:
            step = max(1, round(1 / (self.rate * self.time_base)))
            return last + step if last >= 0 else 0
        return max(pts, last + 1)

    def _upright(self, picture: Any, number: int, size: tuple[int, int] | None) -> np.ndarray:
        if size is None:
            check_size(picture.height, picture.width, str(self.path), self._max_pixels)
        turns = round(picture.rotation / 90)
        image = np.ascontiguousarray(np.rot90(picture.to_ndarray(format="rgb24"), turns))
        if number == 0 and turns % 2:
            self.pixel_aspect = 1 / self.pixel_aspect
        if size is not None and image.shape[:2] != size:
            raise ImageError(
                f"{self.path}: frame {number} is {image.shape[1]} x {image.shape[0]} pixels, those before are "
                f"{size[1]} x {size[0]}: cut the video where its size changes"
            )
        return image


def pyav() -> Any:
    """The module `av`. Raises ValueError, one line, if it is not installed."""
    try:
        import av
    except ImportError:
        raise UserError("videos need PyAV: pip install 'opensan[video]'") from None
    return av
