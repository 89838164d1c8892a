"""Synthesizes the clip that ``mlx_lowbit.demo`` transcribes where espeak-ng is not installed.

    python -m benchmarks.make_speech

Three seconds of vowels: pulses of the glottis through resonators at the formants, gliding from one
vowel to the next (formants of a male voice: Peterson and Barney, 1952, rounded).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

RATE = 16000
# (seconds, formants in Hz, pitch in Hz, loudness)
VOWELS = (
    (0.35, (570, 840, 2410), 118, 1.0),
    (0.30, (390, 1990, 2550), 126, 0.9),
    (0.10, (300, 870, 2240), 110, 0.1),
    (0.40, (730, 1090, 2440), 122, 1.0),
    (0.35, (270, 2290, 3010), 134, 0.8),
    (0.15, (440, 1020, 2240), 112, 0.1),
    (0.45, (530, 1840, 2480), 120, 1.0),
    (0.40, (300, 870, 2240), 104, 0.9),
    (0.50, (660, 1720, 2410), 96, 0.7),
)
WIDTHS = (60.0, 90.0, 150.0)  # of the formants, Hz
FILE = Path(__file__).parents[1] / "python" / "mlx_lowbit" / "demo_model" / "speech.ogg"


def contour(values: list[float], ends: np.ndarray, count: int) -> np.ndarray:
    """Values that hold at the middle of each vowel, with straight lines between them."""
    starts = np.concatenate([[0], ends[:-1]])
    return np.interp(np.arange(count), (starts + ends) / 2, values)


def resonate(x: np.ndarray, frequency: np.ndarray, width: float) -> np.ndarray:
    """x through a resonator of two poles whose frequency moves."""
    radius = np.exp(-np.pi * width / RATE)
    turn, gain = 2 * radius * np.cos(2 * np.pi * frequency / RATE), 1 - radius
    y = np.zeros(len(x) + 2)
    for i in range(len(x)):
        y[i + 2] = gain * x[i] + turn[i] * y[i + 1] - radius**2 * y[i]
    return y[2:]


def synthesize() -> np.ndarray:
    """Three seconds of float32 samples at RATE, at most 0.5."""
    ends = np.cumsum([RATE * vowel[0] for vowel in VOWELS])
    count = int(ends[-1])
    pitch = contour([vowel[2] for vowel in VOWELS], ends, count)
    phase = np.cumsum(pitch / RATE) % 1.0
    pulses = np.where(phase < 0.6, np.sin(np.pi * phase / 0.6) ** 2, 0.0)
    breath = 0.01 * np.random.default_rng(0).standard_normal(count)
    sound = np.diff(pulses, prepend=0.0) + breath * contour([v[3] for v in VOWELS], ends, count)
    for formant, width in enumerate(WIDTHS):
        sound = resonate(sound, contour([v[1][formant] for v in VOWELS], ends, count), width)
    sound *= contour([vowel[3] for vowel in VOWELS], ends, count)
    return (0.5 * sound / np.abs(sound).max()).astype(np.float32)


def main() -> None:
    """Writes the clip."""
    import soundfile

    soundfile.write(FILE, synthesize(), RATE, format="OGG", subtype="VORBIS")
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
