"""Philox4x32 and the dropout mask it draws, in numpy: written apart from the package, from the paper.

Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import numpy as np

MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
WEYL = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
LOW = np.uint64(0xFFFFFFFF)
WORD = np.uint64(32)


def philox(counter: np.ndarray, key: tuple[int, int], rounds: int) -> np.ndarray:
    """Four 32-bit words (as uint64) for each counter; counter (..., 4), result (..., 4)."""
    words = [counter[..., i].astype(np.uint64) for i in range(4)]
    keys = np.array(key, dtype=np.uint64)
    for number in range(rounds):
        k = (keys + np.uint64(number) * WEYL) & LOW
        even, odd = words[0] * MULTIPLIERS[0], words[2] * MULTIPLIERS[1]
        words = [(odd >> WORD) ^ words[1] ^ k[0], odd & LOW, (even >> WORD) ^ words[3] ^ k[1], even & LOW]
    return np.stack(words, -1)


def draws(key: int, M: int, N: int) -> np.ndarray:
    """The (M, N) 16-bit draws of the dropout mask: column 8c + 4i + 2k + h is half h of word 2k + i of call c."""
    row, col = np.meshgrid(np.arange(M), np.arange(N), indexing="ij")
    zero = np.zeros_like(row)
    words = philox(np.stack([col // 8, row, zero, zero], -1), (key & 0xFFFFFFFF, key >> 32), rounds=7)
    i, k, half = col % 8 // 4, col % 4 // 2, col % 2
    word = np.take_along_axis(words, (2 * k + i)[..., None], -1)[..., 0]
    return (word >> (16 * half).astype(np.uint64)) & np.uint64(0xFFFF)


def multiplier(key: int, M: int, N: int, p: float) -> np.ndarray:
    """(M, N) fp32: 0 where dropped, 2^16 / (2^16 - round(p 2^16)) where kept."""
    threshold = round(p * 65536)
    scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    return np.where(draws(key, M, N) < threshold, 0.0, scale).astype(np.float32)
