"""What Qwen3-ASR hears: the log-mel spectrogram of a clip, and the encoder that reads it.

A clip at 16 kHz has a frame every 160 samples and is read in chunks of 100 frames (1 s). Three
convolutions make 13 tokens of a whole chunk, and attention sees windows of 8 chunks, 104 tokens.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import ops
from .qwen3 import attention, check_positive

SAMPLE_RATE = 16000
MIN_SAMPLES = 8000  # shorter clips are filled up with silence
_FFT, _HOP = 400, 160
_FRAMES_AT_ONCE = 4096  # of the spectrogram
_CHUNKS_AT_ONCE = 8  # of the convolutions, whose patches take 14 MB each in float32

_COUNTS = (
    "num_mel_bins",
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "downsample_hidden_size",
    "n_window",
    "n_window_infer",
    "output_dim",
)


@dataclass
class AudioArgs:
    """``audio_config``; what is missing or null has the value of Qwen3-ASR-1.7B.

    Attributes:
        n_window: half the frames of a chunk.
        n_window_infer: frames of an attention window, a multiple of a chunk's.
        output_dim: columns of the result, the decoder's hidden_size.
    """

    num_mel_bins: int = 128
    d_model: int = 1024
    encoder_layers: int = 24
    encoder_attention_heads: int = 16
    encoder_ffn_dim: int = 4096
    downsample_hidden_size: int = 480
    n_window: int = 50
    n_window_infer: int = 800
    output_dim: int = 2048
    activation_function: str = "gelu"

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> AudioArgs:
        """From ``audio_config`` of either layout.

        Raises:
            ValueError: a value that does not fit, by name.
        """
        names = {field.name for field in fields(cls)}
        return cls(**{k: v for k, v in config.items() if k in names and v is not None})

    def __post_init__(self) -> None:
        check_positive(self, _COUNTS, int)
        if self.activation_function != "gelu":
            raise ValueError(
                f"activation_function: expected 'gelu', got {self.activation_function!r}"
            )
        if self.d_model % self.encoder_attention_heads or self.d_model % 2 or self.d_model < 4:
            raise ValueError(
                f"d_model: expected an even multiple of {self.encoder_attention_heads} heads, "
                f"4 at least, got {self.d_model}"
            )
        if self.n_window_infer % self.chunk:
            raise ValueError(
                f"n_window_infer: expected a multiple of {self.chunk}, got {self.n_window_infer}"
            )
        if self.downsample_hidden_size == 3:
            raise ValueError("downsample_hidden_size: 3 leaves open how convolutions are laid out")

    @property
    def chunk(self) -> int:
        """Frames that are read together."""
        return 2 * self.n_window


def output_length(frames: int, chunk: int = 100) -> int:
    """How many tokens the encoder makes of so many frames.

    Each convolution makes (L - 1) // 2 + 1 of L columns; floor division makes 0 of 0, where one
    that truncates would make a 14th token of every whole chunk.
    """
    whole, rest = divmod(frames, chunk)
    for _ in range(3):
        chunk, rest = (chunk - 1) // 2 + 1, (rest - 1) // 2 + 1
    return whole * chunk + rest


# --- the spectrogram ----------------------------------------------------------------------------


def checked(samples: np.ndarray) -> np.ndarray:
    """`samples` as an array, if it is floats [samples].

    Raises:
        ValueError: no samples, not one dimension, or samples that are not finite.
    """
    samples = np.asarray(samples)
    if samples.ndim != 1 or samples.dtype.kind != "f":
        raise ValueError(f"samples: expected floats [samples], got {samples.dtype} {samples.shape}")
    if samples.size == 0:
        raise ValueError("samples: expected some, got none")
    if not np.isfinite(samples).all():
        first = int(np.flatnonzero(~np.isfinite(samples))[0])
        raise ValueError(f"samples: expected finite numbers, got {samples[first]} at {first}")
    return samples


def log_mel(samples: np.ndarray, bins: int = 128) -> np.ndarray:
    """The log-mel spectrogram of a clip, as Whisper's extractor has it without its 30 s.

    Args:
        samples: floats [samples] at 16 kHz, about -1 to 1; fewer than 8000 are followed by zeros.
        bins: bands, between 0 and 8000 Hz.

    Returns:
        float32 [bins, samples // 160].

    Raises:
        ValueError: no samples, not one dimension, or samples that are not finite.
    """
    samples = checked(samples)
    samples = np.pad(samples.astype(np.float32), (0, max(0, MIN_SAMPLES - samples.size)))
    frames = samples.size // _HOP
    # Centered: frame t is about sample 160 t, so half a window is mirrored at either end.
    padded = np.pad(samples, _FFT // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::_HOP][:frames]
    hann = np.hanning(_FFT + 1)[:-1]
    mel = np.empty((frames, bins), np.float32)
    for begin in range(0, frames, _FRAMES_AT_ONCE):
        part = slice(begin, begin + _FRAMES_AT_ONCE)
        power = np.abs(np.fft.rfft(windows[part] * hann)) ** 2
        mel[part] = np.log10(np.maximum(power @ mel_filters(bins), 1e-10))
    return (np.maximum(mel, mel.max() - 8).T + 4) / 4


@functools.cache
def mel_filters(bins: int) -> np.ndarray:
    """Slaney's triangles of equal area, float64 [201, bins], for 0 to 8000 Hz."""
    # Linear below 1000 Hz with 3 mel for 200 Hz, logarithmic above with 27 mel for a factor of 6.4.
    knee, step = 15.0, math.log(6.4) / 27
    top = knee + math.log(SAMPLE_RATE / 2 / 1000) / step
    mel = np.linspace(0, top, bins + 2)
    edges = np.where(mel < knee, mel * 200 / 3, 1000 * np.exp(step * (mel - knee)))
    hertz = np.linspace(0, SAMPLE_RATE / 2, _FFT // 2 + 1)[:, None]
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    rise, fall = (hertz - low) / (middle - low), (high - hertz) / (high - middle)
    return np.maximum(0, np.minimum(rise, fall)) * 2 / (high - low)


# --- the encoder --------------------------------------------------------------------------------


class Conv2d(nn.Conv2d):
    """A convolution 3x3 by steps of 2 with a border of zeros; weight [out, 3, 3, in].

    On a CPU it is one dense product over patches: MLX's own convolution took 1.8 s for a chunk
    where this takes 0.04 s (480 channels, two cores with AMX).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, H, W, in] -> [B, (H + 1) // 2, (W + 1) // 2, out]."""
        if mx.default_device().type != mx.cpu or ops.get_backend() == "mlx":
            return super().__call__(x)
        batch, height, width, channels = x.shape
        # Positions beyond what even steps reach are not in the view below.
        x = mx.contiguous(mx.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))
        row, image = (width + 2) * channels, (height + 2) * (width + 2) * channels
        shape = (batch, (height + 1) // 2, (width + 1) // 2, 3, 3, channels)
        patches = mx.as_strided(x, shape, (image, 2 * row, 2 * channels, row, channels, 1))
        weight = self.weight.reshape(self.weight.shape[0], -1)
        return ops.linear(patches.reshape(*shape[:3], -1), weight, bias=self.bias)


class AudioAttention(nn.Module):
    """Attention of all tokens of a window to each other."""

    def __init__(self, args: AudioArgs) -> None:
        super().__init__()
        self.heads = args.encoder_attention_heads
        self.scale = (args.d_model // self.heads) ** -0.5
        self.q_proj = nn.Linear(args.d_model, args.d_model)
        self.k_proj = nn.Linear(args.d_model, args.d_model)
        self.v_proj = nn.Linear(args.d_model, args.d_model)
        self.out_proj = nn.Linear(args.d_model, args.d_model)

    def __call__(self, x: mx.array, window: int) -> mx.array:
        """x [tokens, d_model] -> [tokens, d_model], each window of tokens by itself."""
        tokens = x.shape[0]
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        whole = tokens - tokens % window
        parts = [
            self._attend(q[begin:end], k[begin:end], v[begin:end], count)
            for begin, end, count in ((0, whole, whole // window), (whole, tokens, 1))
            if begin < end
        ]
        return self.out_proj(parts[0] if len(parts) == 1 else mx.concatenate(parts))

    def _attend(self, q: mx.array, k: mx.array, v: mx.array, windows: int) -> mx.array:
        q, k, v = (
            each.reshape(windows, -1, self.heads, each.shape[-1] // self.heads).swapaxes(1, 2)
            for each in (q, k, v)
        )
        y = attention(q, k, v, scale=self.scale)
        return y.swapaxes(1, 2).reshape(-1, self.heads * y.shape[-1])


class EncoderLayer(nn.Module):
    """Attention and a feed-forward part, each of what is normalized and added to what went in."""

    def __init__(self, args: AudioArgs) -> None:
        super().__init__()
        self.self_attn = AudioAttention(args)
        self.self_attn_layer_norm = nn.LayerNorm(args.d_model)
        self.fc1 = nn.Linear(args.d_model, args.encoder_ffn_dim)
        self.fc2 = nn.Linear(args.encoder_ffn_dim, args.d_model)
        self.final_layer_norm = nn.LayerNorm(args.d_model)

    def __call__(self, x: mx.array, window: int) -> mx.array:
        """x [tokens, d_model] -> [tokens, d_model]."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), window)
        x = x + self.fc2(nn.gelu(self.fc1(self.final_layer_norm(x))))
        if x.dtype == mx.float16:  # sums may leave its range
            limit = mx.finfo(mx.float16).max - 1000
            x = mx.clip(x, -limit, limit)
        return x


class AudioEncoder(nn.Module):
    """Convolutions, positions, layers, and the projection to the decoder's width."""

    def __init__(self, args: AudioArgs) -> None:
        super().__init__()
        self.args = args
        channels = args.downsample_hidden_size
        self.conv2d1 = Conv2d(1, channels)
        self.conv2d2 = Conv2d(channels, channels)
        self.conv2d3 = Conv2d(channels, channels)
        rows = args.num_mel_bins
        for _ in range(3):
            rows = (rows + 1) // 2
        self.conv_out = nn.Linear(channels * rows, args.d_model, bias=False)
        self.layers = [EncoderLayer(args) for _ in range(args.encoder_layers)]
        self.ln_post = nn.LayerNorm(args.d_model)
        self.proj1 = nn.Linear(args.d_model, args.d_model)
        self.proj2 = nn.Linear(args.d_model, args.output_dim)

    def __call__(self, features: mx.array) -> mx.array:
        """features [num_mel_bins, frames] of one clip -> [tokens, output_dim].

        tokens is :func:`output_length` of frames. The last chunk is filled up with zeros.
        """
        args = self.args
        bins, frames = features.shape
        if bins != args.num_mel_bins or frames == 0:
            raise ValueError(
                f"features: expected [{args.num_mel_bins}, frames], got {list(features.shape)}"
            )
        chunks = -(-frames // args.chunk)
        x = mx.pad(features, ((0, 0), (0, chunks * args.chunk - frames)))
        x = x.astype(self.conv2d1.weight.dtype)
        x = x.reshape(bins, chunks, args.chunk).swapaxes(0, 1)[..., None]
        x = mx.concatenate(
            [self._convolve(x[i : i + _CHUNKS_AT_ONCE]) for i in range(0, chunks, _CHUNKS_AT_ONCE)]
        )
        each = x.shape[1]
        # Only the last chunk can have fewer tokens.
        x = x.reshape(chunks * each, -1)[: output_length(frames, args.chunk)]
        for layer in self.layers:
            x = layer(x, each * (args.n_window_infer // args.chunk))
        return self.proj2(nn.gelu(self.proj1(self.ln_post(x))))

    def _convolve(self, x: mx.array) -> mx.array:
        """Chunks [B, bins, frames, 1] -> [B, tokens, d_model] with positions from 0 in each."""
        for convolution in (self.conv2d1, self.conv2d2, self.conv2d3):
            x = nn.gelu(convolution(x))
        # [B, rows, tokens, channels]; the channel is the outer index of conv_out's columns.
        x = x.transpose(0, 2, 3, 1).flatten(2)
        x = self.conv_out(x)
        return x + sinusoids(x.shape[1], x.shape[2]).astype(x.dtype)


def sinusoids(length: int, channels: int) -> mx.array:
    """Positions, float32 [length, channels]: sines in the first half, cosines in the second."""
    half = channels // 2
    rates = np.exp(-math.log(10000) / (half - 1) * np.arange(half))
    angles = np.arange(length)[:, None] * rates
    return mx.array(np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32))


def layout(name: str, weight: mx.array) -> mx.array:
    """A tensor of the encoder in MLX's layout: convolutions [out, 3, 3, in], told by their shape.

    torch's [out, in, 3, 3] is transposed; everything else stays as it is.
    """
    if ".conv2d" not in name or not name.endswith(".weight") or weight.ndim != 4:
        return weight
    inputs = 1 if name.endswith(".conv2d1.weight") else weight.shape[0]
    torch = weight.shape[1:] == (inputs, 3, 3)
    return weight.transpose(0, 2, 3, 1) if torch else weight
