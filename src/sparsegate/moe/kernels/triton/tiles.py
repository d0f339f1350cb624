"""What the products share: where a tile lies, and the loop over the inner dimension.

Kernels are persistent: as many programs as the device runs at once walk over the tiles in order. Tiles that
are next to each other share operands, so that what one program reads from memory the others find in cache.
No size of a layer nor a number of tokens is a constant of a kernel, or each layer would wait for its own
compilation; constant is only whether tiles cut a size without a rest (`WHOLE_`), which saves masks.
"""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def locate(tile, expert_of_tile_ptr, first_tile_ptr, first_row_ptr, num_columns, ROWS: tl.constexpr):
    """Expert, first row, end of the expert's rows and column of a tile; `num_columns`: tiles side by side.

    All tiles of an expert are adjacent, so that its weights are read from memory once.
    """
    expert = tl.load(expert_of_tile_ptr + tile // num_columns)
    first_tile = tl.load(first_tile_ptr + expert)
    num_tiles = tl.load(first_tile_ptr + expert + 1) - first_tile
    first_row = tl.load(first_row_ptr + expert)
    end_row = tl.load(first_row_ptr + expert + 1)
    row, column = in_groups(tile - first_tile * num_columns, num_tiles, num_columns)
    return expert.to(tl.int64), first_row + row * ROWS, end_row, column


@triton.jit
def in_groups(tile, num_rows, num_columns, GROUP: tl.constexpr = 8):
    """Row and column of a tile of a matrix.

    GROUP rows of tiles at a time go through the columns together, so that the tiles that run at the same time
    read few rows and few columns, though the matrix be larger than the cache.
    """
    group = tile // (GROUP * num_columns) * GROUP
    height = tl.minimum(num_rows - group, GROUP)
    within = tile - group * num_columns
    return group + within % height, within // height


@triton.jit
def product(
    left_ptr,
    left_stride,
    weight_ptr,
    weight_stride,
    is_column,
    depth,
    WHOLE_INNER: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of rows times an expert's matrix, accumulated in float32.

    left_ptr [rows], weight_ptr [columns]: where each row and each column begins; the strides lead along the
    inner dimension, which is `depth` long. is_column [columns]: false past the matrix's edge.
    """
    acc = tl.zeros((left_ptr.shape[0], weight_ptr.shape[0]), dtype=tl.float32)
    for start in range(0, depth, INNER):
        inner = start + tl.arange(0, INNER)
        is_inner = (inner < depth) | WHOLE_INNER
        left = tl.load(left_ptr[:, None] + inner[None, :] * left_stride, mask=is_inner[None, :], other=0.0)
        weight = tl.load(
            weight_ptr[None, :] + inner[:, None] * weight_stride,
            mask=is_inner[:, None] & is_column[None, :],
            other=0.0,
        )
        acc = multiply_add(left, weight, acc, PRECISION)
    return acc


@triton.jit
def multiply_add(left, right, acc, PRECISION: tl.constexpr):
    """acc + left @ right on the tensor cores, in float32. right may be narrower than left."""
    if _INTERPRETED:
        # The interpreter would multiply the bits of bfloat16 as integers; in float32 the products are exact.
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right.to(left.dtype), acc, input_precision=PRECISION)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in float32, in few instructions: its relative error is at most |x| 2^-24, or 2^-22.

    tl.sigmoid looks after exponentials below 2^-126 and above 2^126 as well; here the result is 1 and 0.
    """
    if _INTERPRETED:
        return tl.sigmoid(x)
    return tl.inline_asm_elementwise(
        """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;  // -1 / ln 2
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;  // 1
            rcp.approx.ftz.f32 $0, t;
        }""",
        constraints="=f,f",
        args=[x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def quarters(tile):
    """Four tiles side by side that make up the given one."""
    left, right = _halves(tile)
    return _halves(left) + _halves(right)


@triton.jit
def _halves(tile):
    HALF: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, HALF)), (0, 2, 1)))
