"""Triton kernels for window attention and its two derivatives.

Names, for one window and head with N tokens of D channels:

- q, k, v and o are queries, keys, values and output, (N, D) each. qkv holds the first three.
- S are the scores and P = softmax(S) their probabilities, (N, N) each.
- gx is the gradient of the loss with respect to x, for any tensor x, such as gq, go or gS.
- gP is the gradient with respect to P except for a constant per row, which does not change gS.
- extra is an optional tensor that the backward adds to gqkv.
- ggqkv and ggbias are the cotangents of gqkv and gbias, which are the gradients of the loss with
  respect to these. The backward of the backward starts from them.
- ggo is the gradient with respect to go. The backward of the backward computes it, together with
  its own gqkv and gbias.
- dS and dP are the changes of S and P along ggqkv and ggbias. dS is centred.
- hS is the gradient with respect to S in the backward of the backward. It is computed from gdP,
  which is the gradient with respect to P there, except for a constant per row.
- centred(X) = X - rowsum(P X). Products of two (N, N) matrices are elementwise.

Forward:

    S = scale q k^T + bias + mask, P = softmax(S), o = P v.

Backward:

    gP = centred(go v^T), gS = P gP,
    gq = scale gS k, gk = scale gS^T q, gv = P^T go,
    gbias = sum of gS over the windows.

Backward of the backward:

    dS = centred(scale (ggq k^T + q ggk^T) + ggbias), dP = P dS,
    gdP = gP dS + go ggv^T, hS = P centred(gdP),
    ggo = dP v + P ggv,
    gq = scale (hS k + gS ggk), gk = scale (hS^T q + gS^T ggq), gv = dP^T go,
    gbias = sum of hS over the windows.

S and P of one window and head fit a tile of 64 x 64, so every kernel recomputes them. Only two
kinds of (N, N) matrices are in memory: bias + mask, one for each mask and head, and partial sums of
gbias. S, P and their gradients are float32, or float64 for float64 inputs.
"""

import triton
import triton.language as tl


@triton.jit
def _dot(x, y, acc):
    """Returns acc + x @ y for two tiles of the op's inputs, which are multiplied in their own
    dtype."""
    return tl.dot(x, y, acc=acc, input_precision="ieee")


@triton.jit
def _dot_of_float32(x, y, acc, TRANSPOSED: tl.constexpr = False):
    """Returns acc + x @ y, or acc + x^T @ y, for an intermediate result x and an input y of the op.

    If y has 16 bits, x is split into the sum of two 16-bit tiles. With bfloat16, these two tiles
    keep 16 bits of x's mantissa, and the tensor cores read them from registers. TF32 would keep 11
    bits and go through shared memory.
    """
    if y.dtype.primitive_bitwidth == 16:
        high = x.to(y.dtype)
        low = (x - high.to(x.dtype)).to(y.dtype)
        if TRANSPOSED:
            high, low = tl.trans(high), tl.trans(low)
        acc = tl.dot(low, y, acc=tl.dot(high, y, acc=acc))
    else:
        if TRANSPOSED:
            x = tl.trans(x)
        acc = tl.dot(x, y, acc=acc, input_precision="ieee")
    return acc


@triton.jit
def _locate_matrix(pointer, index, BLOCK_TOKENS: tl.constexpr):
    """Returns pointers to all elements of matrix number `index` in a stack of padded matrices.

    Each matrix has the shape (BLOCK_TOKENS, BLOCK_TOKENS).
    """
    i, j = tl.arange(0, BLOCK_TOKENS)[:, None], tl.arange(0, BLOCK_TOKENS)[None, :]
    return pointer + index.to(tl.int64) * (BLOCK_TOKENS * BLOCK_TOKENS) + i * BLOCK_TOKENS + j


@triton.jit
def softmax(scores):
    p = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return p / tl.sum(p, axis=1)[:, None]


@triton.jit
def centre(x, p):
    """Returns x - sum(p * x) over each row, where p are the probabilities that a softmax returned.

    Let x be the gradient of the loss with respect to p. Then p * result is the gradient with
    respect to the input of the softmax.
    """
    return x - tl.sum(p * x, axis=1)[:, None]


@triton.jit
def _locate_window(
    window, head, qkv_pointer, o_pointer, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """Returns pointers to the first element of a window and head, in two tensors.

    - window, head: indices of the window and head.
    - qkv_pointer: tensor with the layout (B, N, 3, H, D).
    - o_pointer: tensor with the layout (B, N, H, D).
    """
    first = tl.cast(window, tl.int64) * (TOKENS * HEADS * DIM)
    return qkv_pointer + first * 3 + head * DIM, o_pointer + first + head * DIM


@triton.jit
def _locate_channels(
    part, channel, PARTS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Returns the offsets of a tile, counted from the window's first element, and its load mask.

    The tile has all tokens and BLOCK_DIM channels, beginning at `channel`.

    - part: 0, 1 or 2 for queries, keys or values.
    - PARTS: 3 for a tensor like qkv, or 1 for a tensor like the output, whose only part is 0.
    """
    n, d = tl.arange(0, BLOCK_TOKENS)[:, None], channel + tl.arange(0, BLOCK_DIM)[None, :]
    return n * (PARTS * HEADS * DIM) + part * HEADS * DIM + d, (n < TOKENS) & (d < DIM)


@triton.jit
def _load(
    pointer, part, channel, PARTS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Loads a tile of one window and head, with zeros for the padding.

    pointer: first element of the window and head. `_locate_channels` describes the other arguments.
    """
    offsets, inside = _locate_channels(
        part, channel, PARTS, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM
    )
    return tl.load(pointer + offsets, mask=inside, other=0.0)


@triton.jit
def _store(
    pointer, value, part, channel, PARTS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Stores a tile of one window and head, without its padding.

    pointer: first element of the window and head. `_locate_channels` describes the other arguments.
    """
    offsets, inside = _locate_channels(
        part, channel, PARTS, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM
    )
    tl.store(pointer + offsets, value, mask=inside)


@triton.jit
def _window_attention_fwd_kernel(
    qkv_pointer, bias_and_mask_pointer, o_pointer, windows, masks,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, SCALE: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Computes the output of the attention.

    - qkv_pointer: queries, keys and values, (B, N, 3, H, D).
    - bias_and_mask_pointer: the padded sums of bias and mask, one for each mask and head.
    - o_pointer: the output, (B, N, H, D), which the kernel writes.
    - windows, masks: the numbers of windows and masks.
    """
    head, strip = tl.program_id(0), tl.program_id(1)
    index = (strip % masks) * HEADS + head
    bias_and_mask = tl.load(_locate_matrix(bias_and_mask_pointer, index, BLOCK_TOKENS))
    zeros_nd = tl.zeros((BLOCK_TOKENS, BLOCK_DIM), COMPUTE_DTYPE)
    zeros_nn = tl.zeros((BLOCK_TOKENS, BLOCK_TOKENS), COMPUTE_DTYPE)
    for window in range(strip, windows, tl.num_programs(1)):
        qkv_window, o_window = _locate_window(
            window, head, qkv_pointer, o_pointer, HEADS, TOKENS, DIM
        )
        scores = zeros_nn
        for channel in range(0, DIM, BLOCK_DIM):
            q = _load(qkv_window, 0, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            k = _load(qkv_window, 1, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            scores = _dot(q, tl.trans(k), scores)
        p = softmax(scores * SCALE + bias_and_mask)
        for channel in range(0, DIM, BLOCK_DIM):
            v = _load(qkv_window, 2, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            o = _dot_of_float32(p, v, zeros_nd)
            _store(o_window, o, 0, channel, 1, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)


@triton.jit
def _window_attention_bwd_kernel(
    go_pointer, qkv_pointer, extra_pointer, bias_and_mask_pointer, gqkv_pointer,
    partial_sums_pointer, windows, masks,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, SCALE: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BIAS_GRAD: tl.constexpr, HAS_EXTRA: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of queries, keys and values, and partial sums of the gradient of the
    bias.

    - go_pointer: gradient of the loss with respect to the output, (B, N, H, D).
    - qkv_pointer: queries, keys and values, (B, N, 3, H, D).
    - extra_pointer: tensor that is added to the gradient of qkv if HAS_EXTRA is True.
    - bias_and_mask_pointer: the padded sums of bias and mask, one for each mask and head.
    - gqkv_pointer: the gradient of qkv, which the kernel writes.
    - partial_sums_pointer: gradients of the bias, summed over the windows of one strip each. A
      strip consists of the windows that one program processes. The kernel adds to them if BIAS_GRAD
      is True.
    - windows, masks: the numbers of windows and masks.
    """
    head, strip = tl.program_id(0), tl.program_id(1)
    zeros_nd = tl.zeros((BLOCK_TOKENS, BLOCK_DIM), COMPUTE_DTYPE)
    zeros_nn = tl.zeros((BLOCK_TOKENS, BLOCK_TOKENS), COMPUTE_DTYPE)
    for window in range(strip, windows, tl.num_programs(1)):
        qkv_window, go_window = _locate_window(
            window, head, qkv_pointer, go_pointer, HEADS, TOKENS, DIM
        )
        gqkv_window, _ = _locate_window(window, head, gqkv_pointer, go_pointer, HEADS, TOKENS, DIM)
        extra_window, _ = _locate_window(
            window, head, extra_pointer, go_pointer, HEADS, TOKENS, DIM
        )
        scores = zeros_nn
        gp = zeros_nn
        for channel in range(0, DIM, BLOCK_DIM):
            q = _load(qkv_window, 0, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            k = _load(qkv_window, 1, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            scores = _dot(q, tl.trans(k), scores)
        scores *= SCALE
        index = (strip % masks) * HEADS + head
        scores += tl.load(_locate_matrix(bias_and_mask_pointer, index, BLOCK_TOKENS))
        p = softmax(scores)
        for channel in range(0, DIM, BLOCK_DIM):
            go = _load(go_window, 0, channel, 1, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            gv = _dot_of_float32(p, go, zeros_nd, TRANSPOSED=True)
            if HAS_EXTRA:
                gv += _load(
                    extra_window, 2, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM
                )
            _store(gqkv_window, gv, 2, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            v = _load(qkv_window, 2, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            gp = _dot(go, tl.trans(v), gp)
        gs = p * centre(gp, p)
        if BIAS_GRAD:
            # The bias gradient is summed in memory, because the sum would take a tile of registers.
            # Only this program adds to this matrix, so every run gives the same bits.
            to = _locate_matrix(partial_sums_pointer, strip * HEADS + head, BLOCK_TOKENS)
            tl.atomic_add(to, gs, sem="relaxed")
        for channel in range(0, DIM, BLOCK_DIM):
            k = _load(qkv_window, 1, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            gq = _dot_of_float32(gs, k, zeros_nd) * SCALE
            if HAS_EXTRA:
                gq += _load(
                    extra_window, 0, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM
                )
            _store(gqkv_window, gq, 0, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            q = _load(qkv_window, 0, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            gk = _dot_of_float32(gs, q, zeros_nd, TRANSPOSED=True) * SCALE
            if HAS_EXTRA:
                gk += _load(
                    extra_window, 1, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM
                )
            _store(gqkv_window, gk, 1, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)


@triton.jit
def _window_attention_bwd_bwd_kernel(
    ggqkv_pointer, ggbias_pointer, go_pointer, qkv_pointer, bias_and_mask_pointer, ggo_pointer,
    gqkv_pointer, partial_sums_pointer, windows, masks,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, SCALE: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BIAS_GRAD: tl.constexpr, HAS_GGBIAS: tl.constexpr,
):  # fmt: skip
    """Computes the second derivative, and writes the gradients of go and qkv into ggo and gqkv.

    The docstring of this file explains the names. If BIAS_GRAD is True, each program adds the bias
    gradients of its own windows to its own part of partial_sums. Registers cannot hold six 64 x 64
    tiles and their operands, so an input is read again, mostly from the cache, for each use.
    """
    head, strip = tl.program_id(0), tl.program_id(1)
    zeros_nd = tl.zeros((BLOCK_TOKENS, BLOCK_DIM), COMPUTE_DTYPE)
    zeros_nn = tl.zeros((BLOCK_TOKENS, BLOCK_TOKENS), COMPUTE_DTYPE)
    for window in range(strip, windows, tl.num_programs(1)):
        qkv_window, go_window = _locate_window(
            window, head, qkv_pointer, go_pointer, HEADS, TOKENS, DIM
        )
        ggqkv_window, _ = _locate_window(
            window, head, ggqkv_pointer, go_pointer, HEADS, TOKENS, DIM
        )
        gqkv_window, ggo_window = _locate_window(
            window, head, gqkv_pointer, ggo_pointer, HEADS, TOKENS, DIM
        )
        scores, ds = zeros_nn, zeros_nn
        for channel in range(0, DIM, BLOCK_DIM):
            q = _load(qkv_window, 0, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            k = _load(qkv_window, 1, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            scores = _dot(q, tl.trans(k), scores)
            ggq = _load(ggqkv_window, 0, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            ds = _dot(ggq, tl.trans(k), ds)
            ggk = _load(ggqkv_window, 1, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            ds = _dot(q, tl.trans(ggk), ds)
        scores *= SCALE
        index = (strip % masks) * HEADS + head
        scores += tl.load(_locate_matrix(bias_and_mask_pointer, index, BLOCK_TOKENS))
        p = softmax(scores)
        ds *= SCALE
        if HAS_GGBIAS:
            ds += tl.load(_locate_matrix(ggbias_pointer, head, BLOCK_TOKENS))
        ds = centre(ds, p)
        dp = p * ds
        for channel in range(0, DIM, BLOCK_DIM):
            v = _load(qkv_window, 2, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            ggo = _dot_of_float32(dp, v, zeros_nd)
            ggv = _load(ggqkv_window, 2, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            ggo = _dot_of_float32(p, ggv, ggo)
            _store(ggo_window, ggo, 0, channel, 1, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            go = _load(go_window, 0, channel, 1, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            gv = _dot_of_float32(dp, go, zeros_nd, TRANSPOSED=True)
            _store(gqkv_window, gv, 2, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
        gp = zeros_nn
        for channel in range(0, DIM, BLOCK_DIM):
            go = _load(go_window, 0, channel, 1, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            v = _load(qkv_window, 2, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            gp = _dot(go, tl.trans(v), gp)
        gp = centre(gp, p)
        gdp = gp * ds
        for channel in range(0, DIM, BLOCK_DIM):
            go = _load(go_window, 0, channel, 1, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            ggv = _load(ggqkv_window, 2, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            gdp = _dot(go, tl.trans(ggv), gdp)
        gs = p * gp
        hs = p * centre(gdp, p)
        if BIAS_GRAD:
            to = _locate_matrix(partial_sums_pointer, strip * HEADS + head, BLOCK_TOKENS)
            tl.atomic_add(to, hs, sem="relaxed")
        for channel in range(0, DIM, BLOCK_DIM):
            ggk = _load(ggqkv_window, 1, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            gq = _dot_of_float32(gs, ggk, zeros_nd)
            k = _load(qkv_window, 1, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            gq = _dot_of_float32(hs, k, gq) * SCALE
            _store(gqkv_window, gq, 0, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            ggq = _load(ggqkv_window, 0, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            gk = _dot_of_float32(gs, ggq, zeros_nd, TRANSPOSED=True)
            q = _load(qkv_window, 0, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
            gk = _dot_of_float32(hs, q, gk, TRANSPOSED=True) * SCALE
            _store(gqkv_window, gk, 1, channel, 3, HEADS, TOKENS, DIM, BLOCK_TOKENS, BLOCK_DIM)
