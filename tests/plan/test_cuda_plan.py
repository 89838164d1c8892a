"""The CUDA plan table, which needs no device: every problem gets a plan that fits the device."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lowbit import _ext
from mlx_lowbit.formats import FORMATS, Format, get

MATVEC, SKINNY, MATMUL, SIMT = range(4)
FLOAT32, FLOAT16, BFLOAT16 = range(3)
H200 = {"capability": 90, "processors": 132, "shared_bytes": 232448}
A100 = {"capability": 80, "processors": 108, "shared_bytes": 166912}
B200 = {"capability": 100, "processors": 148, "shared_bytes": 232448}
RTX4090 = {"capability": 89, "processors": 128, "shared_bytes": 101376}


def plan(fmt: Format, M: int, N: int, K: int, dtype: int = BFLOAT16, **options):
    words, *numbers = _ext.cuda_plan(fmt.id, dtype, M, N, K, **options)
    return words, *numbers


def skinny_takes(fmt: Format) -> bool:
    return fmt.bits in (3, 4, 8)


def e2m1(fmt: Format) -> bool:
    return fmt.mode != "affine" and fmt.bits == 4


@pytest.mark.parametrize("M, tokens", [(1, 1), (2, 4), (4, 4), (5, 8), (8, 8), (9, 16), (16, 16)])
@pytest.mark.parametrize("device, K", [(H200, 4096), (A100, 1024)], ids=["H200", "A100"])
def test_few_rows_read_weights_once(fmt, M, tokens, device, K):
    words, kernel, got, *_ = plan(fmt, M, 4096, K, **device)
    want = MATVEC
    if device == H200 and fmt.mode == "nvfp4" and M > 1:
        want, tokens = SKINNY, max(tokens, 8)
    elif device == H200 and M > 4:
        want = SKINNY if skinny_takes(fmt) else MATMUL if M > 8 else MATVEC
    assert (kernel, got) == (want, tokens), words


@pytest.mark.parametrize("M", [5, 8])
def test_large_matrices_of_8_bits_leave_matvec_sooner(fmt, M):
    words, kernel, *_ = plan(fmt, M, 14336, 4096)
    assert kernel == (SKINNY if fmt.bits == 8 or fmt.mode == "nvfp4" else MATVEC), words
    words, kernel, *_ = plan(fmt, M, 14336, 4096 + 128)
    assert kernel == (MATMUL if fmt.bits == 8 else MATVEC), words


@pytest.mark.parametrize(
    "name, M, N, kernel",
    [
        ("nvfp4", 1, 14336, MATVEC),
        ("nvfp4", 2, 14336, SKINNY),
        ("mxfp8", 4, 14336, MATVEC),
        ("mxfp8", 5, 14336, SKINNY),
        ("mxfp8", 8, 28672, MATVEC),
    ],
)
def test_matvec_takes_the_rows_that_it_quantizes_for_less(name, M, N, kernel):
    words, got, *_ = plan(get(name), M, N, 4096, quantize_x=True)
    assert got == kernel, words


@pytest.mark.parametrize(
    "M, N, skinny",
    [(1, 14336, False), (2, 14336, True), (4, 2112, False), (4, 2128, True), (4, 14800, False)],
)
@pytest.mark.parametrize("quantize_x", [False, True])
def test_nvfp4_with_one_turn_of_some_tiles_is_skinnys(M, N, skinny, quantize_x):
    words, kernel, *_ = plan(get("nvfp4"), M, N, 4096, quantize_x=quantize_x)
    assert kernel == (SKINNY if skinny else MATVEC), words


@pytest.mark.parametrize("M", [1, 2, 4, 8, 16])
def test_long_rows_of_few_weights_are_skinnys(fmt, M):
    words, kernel, tokens, *_ = plan(fmt, M, 4096, 14336)
    assert (kernel == SKINNY) == (M > 1 and skinny_takes(fmt)), words
    assert tokens >= M
    if fmt.mode in ("mxfp8", "nvfp4"):
        words, kernel, *_ = plan(fmt, M, 4096, 14336, quantize_x=True)
        assert kernel == (SKINNY if M > 1 else MATVEC), words


@pytest.mark.parametrize("N, skinny", [(1, True), (29568, True), (29569, False)])
def test_more_rows_of_weights_than_two_turns_are_not_skinnys(fmt, N, skinny):
    words, kernel, *_ = plan(fmt, 16, N, 4096)
    assert (kernel == SKINNY) == (skinny and skinny_takes(fmt)), words


@pytest.mark.parametrize("K, of_x", [(4096 + 128, BFLOAT16), (768, BFLOAT16), (4096, FLOAT32)])
def test_rows_that_tensor_copies_cannot_take_are_not_skinnys(K, of_x):
    fmt = get("affine", bits=4)
    words, kernel, *_ = plan(fmt, 16, 4096, K, of_x)
    assert kernel != SKINNY, words


@pytest.mark.parametrize("N, kernel", [(1024, MATVEC), (2048, MATMUL)])
def test_few_rows_of_weights_make_too_few_tiles_of_wgmma(fmt, N, kernel):
    words, got, *_ = plan(fmt, 16, N, 3968)
    assert got == (MATVEC if e2m1(fmt) else kernel), words


@pytest.mark.parametrize(
    "M, N, tokens",
    [(17, 4096, 32), (32, 4096, 32), (17, 14336, 32), (33, 14336, 64), (64, 14336, 64)],
)
def test_tiles_are_as_wide_as_x(fmt, M, N, tokens):
    words, kernel, got, *_ = plan(fmt, M, N, 4096)
    skinny = M <= 32 and skinny_takes(fmt) and (N == 4096 or e2m1(fmt))
    assert (kernel, got) == (SKINNY if skinny else MATMUL, tokens), words


@pytest.mark.parametrize("M, rows", [(64, 128), (140, 256), (200, 256), (256, 256), (2048, 256)])
def test_blocks_share_the_tokens_of_large_tiles(fmt, M, rows):
    words, kernel, tokens, got, *_ = plan(fmt, M, 14336, 4096)
    assert (kernel, tokens, got) == (MATMUL, 64 if M == 64 else 256, rows), words


@pytest.mark.parametrize(
    "M, N, K, tokens", [(80, 4096, 4096, 64), (384, 4096, 4096, 128), (768, 4096, 4096, 256),
                        (140, 14336, 4096, 256), (320, 14336, 4096, 128), (500, 14336, 4096, 256),
                        (140, 4096, 14336, 128), (1000, 4096, 14336, 256)]
)  # fmt: skip
def test_tiles_leave_few_tokens_and_multiprocessors_idle(fmt, M, N, K, tokens):
    words, kernel, got, *_ = plan(fmt, M, N, K)
    assert (kernel, got) == (MATMUL, tokens), words


@pytest.mark.parametrize(
    "M, N, K, two", [(64, 4096, 14336, True), (100, 4096, 14336, True), (256, 4096, 14336, False),
                     (64, 8192, 14336, False), (64, 4096, 4096, False), (40, 200, 12288, True)]
)  # fmt: skip
def test_long_rows_of_few_tiles_are_two_clusters(fmt, M, N, K, two):
    words, kernel, *_, split = plan(fmt, M, N, K)
    assert kernel == MATMUL and (split == 4) == two == ("two clusters of 2 blocks" in words), words


def test_many_rows_on_hopper_use_wgmma(fmt):
    words, kernel, *_ = plan(fmt, 2048, 14336, 4096)
    assert kernel == MATMUL and "wgmma" in words


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": FLOAT32},
        {"transpose": False},
        {"quantize_x": True, "dtype": FLOAT16},
        {"pairs": 64, "matrices": 8, "dtype": FLOAT32},
        {"pairs": 64, "matrices": 8, "transpose": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("M", [1, 2048])
def test_other_cases_use_float32_arithmetic(fmt, M, options):
    words, kernel, *_ = plan(fmt, M, 4096, 4096, **options)
    assert kernel == SIMT, words


@pytest.mark.parametrize(
    "M, of_x, options, decoded",
    [
        (1, BFLOAT16, {"transpose": False}, True),
        (17, BFLOAT16, A100, True),
        (17, FLOAT16, A100, None),
        (17, FLOAT32, A100, False),
        (16, BFLOAT16, A100, False),
    ],
    ids=["untransposed", "17 rows", "float16", "float32", "16 rows"],
)
@pytest.mark.parametrize("groups", [1, 32])
def test_weights_are_decoded_first_where_that_pays(fmt, M, of_x, options, decoded, groups):
    """None: unless a global scale may leave too little of them in float16."""
    words, *_ = plan(fmt, M, 4096, groups * fmt.group_size, of_x, **options)
    want = fmt.mode != "nvfp4" if decoded is None else decoded
    assert ("then MLX's matmul" in words) == want, words


@pytest.mark.parametrize(
    "M, of_x, device, groups, route",
    [
        (17, BFLOAT16, A100, 1, "x quantized, it and weights decoded"),
        (17, BFLOAT16, B200, 1, "x quantized, it and weights decoded"),
        (17, BFLOAT16, B200, 32, "cuBLASLt"),
        (16, BFLOAT16, B200, 32, "after quantizing x"),
        (17, FLOAT16, A100, 32, "simt"),
    ],
    ids=str,
)
def test_many_quantized_rows_are_mlxs_where_we_have_no_kernel(
    qq_fmt, M, of_x, device, groups, route
):
    K = groups * qq_fmt.group_size
    words, *_ = plan(qq_fmt, M, 4096, K, of_x, quantize_x=True, **device)
    assert route in words, words


@pytest.mark.parametrize("device", [H200, A100, RTX4090], ids=["H200", "A100", "4090"])
@given(data=st.data())
def test_every_problem_has_a_plan_that_fits(device, data):
    fmt = data.draw(st.sampled_from(FORMATS))
    M = data.draw(st.integers(1, 5000))
    N = data.draw(st.integers(1, 200_000))
    K = data.draw(st.integers(1, 1000)) * fmt.group_size
    dtype = data.draw(st.sampled_from([FLOAT32, FLOAT16, BFLOAT16]))
    words, kernel, tokens, rows, stages, split_k = plan(fmt, M, N, K, dtype, **device)
    assert words and kernel in (MATVEC, SKINNY, MATMUL, SIMT)
    if kernel == SKINNY:
        assert device["capability"] == 90 and dtype != FLOAT32
        assert M <= tokens <= 32 and rows <= 112 and stages >= 3
    if kernel == MATVEC:
        assert tokens >= M and K % 32 == 0 and dtype != FLOAT32
        assert split_k == 1 or device["capability"] >= 90
    if kernel == MATMUL:
        assert device["capability"] == 90 and dtype != FLOAT32


@pytest.mark.parametrize("M, kernel", [(1, MATVEC), (2048, MATMUL)])
def test_quantized_bfloat16_takes_the_place_of_x(qq_fmt, M, kernel):
    words, got, *_ = plan(qq_fmt, M, 4096, 4096, quantize_x=True)
    assert got == kernel and "after quantizing x" in words


@pytest.mark.parametrize(
    "device, pairs, kernel, tokens, how",
    [
        (H200, 8, MATVEC, 1, "pair by pair"),
        (H200, 32, MATVEC, 1, "pair by pair"),
        (H200, 33, MATVEC, 4, "sorted"),
        (H200, 256, MATVEC, 4, "sorted"),
        (H200, 257, MATVEC, 8, "sorted"),
        (H200, 1280, MATVEC, 8, "sorted"),
        (H200, 32768, MATMUL, None, "sorted"),
        (A100, 32768, MATVEC, 8, "sorted"),
    ],
)
def test_experts_are_read_once_for_many_rows(fmt, device, pairs, kernel, tokens, how):
    words, got, width, *_ = plan(fmt, 1, 1408, 2048, pairs=pairs, matrices=128, **device)
    assert got == kernel and how in words, words
    assert tokens is None or width == tokens


@pytest.mark.parametrize("pairs, tokens", [(128 * 48, 64), (128 * 256, 288)])
def test_experts_with_many_rows_take_the_widest_tile(fmt, pairs, tokens):
    words, kernel, got, *_ = plan(fmt, 1, 1408, 4096, pairs=pairs, matrices=128)
    assert (kernel, got) == (MATMUL, tokens), words


def test_pairs_of_more_rows_than_a_tile_are_sorted(fmt):
    words, kernel, tokens, *_ = plan(fmt, 9, 256, 512, pairs=2, matrices=64)
    assert (kernel, tokens) == (MATVEC, 8) and "sorted" in words


@pytest.mark.parametrize("M, pairs, tokens", [(2, 40, 4), (4, 40, 8), (5, 33, 8)])
def test_tiles_of_four_rows_are_for_few_rows_a_matrix(fmt, M, pairs, tokens):
    words, kernel, got, *_ = plan(fmt, M, 256, 512, pairs=pairs, matrices=64)
    assert (kernel, got) == (MATVEC, tokens) and "sorted" in words


def test_long_rows_of_x_are_split_over_a_cluster():
    fmt = get("affine", bits=6)
    *_, few = plan(fmt, 1, 4096, 14336)
    words, *_, many = plan(fmt, 8, 4096, 14336)
    assert few == 1 and many > 1
    assert int(re.search(r"clusters of (\d+)", words)[1]) == many
