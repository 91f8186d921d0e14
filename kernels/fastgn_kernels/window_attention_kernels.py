"""The Triton kernels of window attention and their launches, one per order.

A window and head fit one 64 x 64 tile, so every order recomputes what it needs from its inputs and
nothing N x N is written to memory but bias + mask, once a mask and head, and the bias' own
gradient, once a strip of windows. With c = scale, B = bias + mask:

forward: S = c Q K^T + B, P = softmax(S), O = P V.
backward of gO: gP = gO V^T, D = rowsum(P gP), gS = P (gP - D); gQ = c gS K, gK = c gS^T Q,
gV = P^T gO, gB = sum of gS over windows.
backward of (a, b, e, d), the cotangents of (gQ, gK, gV, gB): T = c (a K^T + Q b^T) + d,
r = rowsum(P T), Pt = P (T - r), U = gP (T - r) - D T + gO e^T, Sb = P (U - rowsum(P U));
to gO: Pt V + P e; to Q: c (Sb K + gS b); to K: c (Sb^T Q + gS^T a); to V: Pt^T gO;
to B: sum of Sb over windows. (Products of N x N terms are elementwise.)

P and its relatives are float32, also beside 16-bit inputs. The kernels take float16 and bfloat16 on
cards of compute capability 8.0 and later; all else takes the same formulas in PyTorch's operators.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgn_kernels.dispatch import LAUNCH, tl_wide, wide


@triton.jit
def _dot(x, y, acc):
    """acc + x y of two inputs, in their own dtype."""
    return tl.dot(x, y, acc=acc, input_precision="ieee")


@triton.jit
def _wide_dot(x, y, acc, TRANSPOSED: tl.constexpr = False):
    """acc + x y, or its transpose's, of a wide tile and an input. Beside a 16-bit input, the tile
    is the sum of two 16-bit ones: 16 bits of mantissa with bfloat16, and the tensor cores take them
    from where the last product left them, where tf32 (11 bits) would go through shared memory."""
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
def _square(ptr, index, BLOCK_N: tl.constexpr):
    """Pointers to the index-th padded N x N tile of a stack."""
    i, j = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_N)[None, :]
    return ptr + index.to(tl.int64) * (BLOCK_N * BLOCK_N) + i * BLOCK_N + j


@triton.jit
def _softmax(s):
    p = tl.exp(s - tl.max(s, axis=1)[:, None])
    return p / tl.sum(p, axis=1)[:, None]


@triton.jit
def _at(window, head, qkv_ptr, o_ptr, HEADS: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr):
    """A window and head's first element in something like qkv and in something like o."""
    first = tl.cast(window, tl.int64) * (TOKENS * HEADS * DIM)
    return qkv_ptr + first * 3 + head * DIM, o_ptr + first + head * DIM


@triton.jit
def _where(
    third, c, THIRDS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of channels c to c + BLOCK_D of the third-th of THIRDS tensors."""
    n, d = tl.arange(0, BLOCK_N)[:, None], c + tl.arange(0, BLOCK_D)[None, :]
    return n * (THIRDS * HEADS * DIM) + third * HEADS * DIM + d, (n < TOKENS) & (d < DIM)


@triton.jit
def _load(
    ptr, third, c, THIRDS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offsets, inside = _where(third, c, THIRDS, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
    return tl.load(ptr + offsets, mask=inside, other=0.0)


@triton.jit
def _store(
    ptr, value, third, c, THIRDS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offsets, inside = _where(third, c, THIRDS, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
    tl.store(ptr + offsets, value, mask=inside)


@triton.jit
def _window_attention_fwd_kernel(
    qkv_ptr, added_ptr, o_ptr, windows, masks, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    DIM: tl.constexpr, SCALE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, strip = tl.program_id(0), tl.program_id(1)
    added = tl.load(_square(added_ptr, (strip % masks) * HEADS + head, BLOCK_N))
    none, nothing = tl.zeros((BLOCK_N, BLOCK_D), WIDE), tl.zeros((BLOCK_N, BLOCK_N), WIDE)
    for window in range(strip, windows, tl.num_programs(1)):
        qkv, o = _at(window, head, qkv_ptr, o_ptr, HEADS, TOKENS, DIM)
        s = nothing
        for c in range(0, DIM, BLOCK_D):
            q = _load(qkv, 0, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            k = _load(qkv, 1, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            s = _dot(q, tl.trans(k), s)
        p = _softmax(s * SCALE + added)
        for c in range(0, DIM, BLOCK_D):
            v = _load(qkv, 2, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            part = _wide_dot(p, v, none)
            _store(o, part, 0, c, 1, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)


@triton.jit
def _window_attention_bwd_kernel(
    go_ptr, qkv_ptr, more_ptr, added_ptr, gqkv_ptr, partial_ptr, windows, masks,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, SCALE: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BIAS_GRAD: tl.constexpr,
    HAS_MORE: tl.constexpr,
):  # fmt: skip
    head, strip = tl.program_id(0), tl.program_id(1)
    none, nothing = tl.zeros((BLOCK_N, BLOCK_D), WIDE), tl.zeros((BLOCK_N, BLOCK_N), WIDE)
    for window in range(strip, windows, tl.num_programs(1)):
        qkv, go_at = _at(window, head, qkv_ptr, go_ptr, HEADS, TOKENS, DIM)
        gqkv, _ = _at(window, head, gqkv_ptr, go_ptr, HEADS, TOKENS, DIM)
        more, _ = _at(window, head, more_ptr, go_ptr, HEADS, TOKENS, DIM)
        s = nothing
        gp = nothing
        for c in range(0, DIM, BLOCK_D):
            q = _load(qkv, 0, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            k = _load(qkv, 1, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            s = _dot(q, tl.trans(k), s)
        p = _softmax(
            s * SCALE + tl.load(_square(added_ptr, (strip % masks) * HEADS + head, BLOCK_N))
        )
        for c in range(0, DIM, BLOCK_D):
            go = _load(go_at, 0, c, 1, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            gv = _wide_dot(p, go, none, TRANSPOSED=True)
            if HAS_MORE:
                gv += _load(more, 2, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            _store(gqkv, gv, 2, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            v = _load(qkv, 2, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            gp = _dot(go, tl.trans(v), gp)
        gs = p * (gp - tl.sum(p * gp, axis=1)[:, None])
        if BIAS_GRAD:
            # in memory, a tile of registers less; no other program adds there, so that the order of
            # the sum, and with it its bits, is the same in every run
            tl.atomic_add(_square(partial_ptr, strip * HEADS + head, BLOCK_N), gs, sem="relaxed")
        for c in range(0, DIM, BLOCK_D):
            k = _load(qkv, 1, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            gq = _wide_dot(gs, k, none) * SCALE
            if HAS_MORE:
                gq += _load(more, 0, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            _store(gqkv, gq, 0, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            q = _load(qkv, 0, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            gk = _wide_dot(gs, q, none, TRANSPOSED=True) * SCALE
            if HAS_MORE:
                gk += _load(more, 1, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            _store(gqkv, gk, 1, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)


@triton.jit
def _window_attention_bwd_bwd_kernel(
    vqkv_ptr, vb_ptr, go_ptr, qkv_ptr, added_ptr, ggo_ptr, gqkv_ptr, partial_ptr, windows, masks,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, SCALE: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BIAS_GRAD: tl.constexpr, HAS_VB: tl.constexpr,
):  # fmt: skip
    # Inputs are read where they are used, the second time from cache, and the order of the products
    # lets each tile die early: six 64 x 64 tiles and their operands do not fit 255 registers.
    head, strip = tl.program_id(0), tl.program_id(1)
    none, nothing = tl.zeros((BLOCK_N, BLOCK_D), WIDE), tl.zeros((BLOCK_N, BLOCK_N), WIDE)
    for window in range(strip, windows, tl.num_programs(1)):
        qkv, go_at = _at(window, head, qkv_ptr, go_ptr, HEADS, TOKENS, DIM)
        vqkv, _ = _at(window, head, vqkv_ptr, go_ptr, HEADS, TOKENS, DIM)
        gqkv, ggo_at = _at(window, head, gqkv_ptr, ggo_ptr, HEADS, TOKENS, DIM)
        s = nothing
        t = nothing
        for c in range(0, DIM, BLOCK_D):
            q = _load(qkv, 0, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            k = _load(qkv, 1, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            s = _dot(q, tl.trans(k), s)
            vq = _load(vqkv, 0, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            t = _dot(vq, tl.trans(k), t)
            vk = _load(vqkv, 1, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            t = _dot(q, tl.trans(vk), t)
        p = _softmax(
            s * SCALE + tl.load(_square(added_ptr, (strip % masks) * HEADS + head, BLOCK_N))
        )
        t *= SCALE
        if HAS_VB:
            t += tl.load(_square(vb_ptr, head, BLOCK_N))
        t -= tl.sum(p * t, axis=1)[:, None]
        pt = p * t
        for c in range(0, DIM, BLOCK_D):
            v = _load(qkv, 2, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            ggo = _wide_dot(pt, v, none)
            vv = _load(vqkv, 2, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            ggo = _wide_dot(p, vv, ggo)
            _store(ggo_at, ggo, 0, c, 1, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            go = _load(go_at, 0, c, 1, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            gv = _wide_dot(pt, go, none, TRANSPOSED=True)
            _store(gqkv, gv, 2, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
        gp = nothing
        for c in range(0, DIM, BLOCK_D):
            go = _load(go_at, 0, c, 1, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            v = _load(qkv, 2, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            gp = _dot(go, tl.trans(v), gp)
        gp -= tl.sum(p * gp, axis=1)[:, None]
        u = gp * t  # short of U by a constant a row, which drops out of Sb
        for c in range(0, DIM, BLOCK_D):
            go = _load(go_at, 0, c, 1, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            vv = _load(vqkv, 2, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            u = _dot(go, tl.trans(vv), u)
        gs = p * gp
        sb = p * (u - tl.sum(p * u, axis=1)[:, None])
        if BIAS_GRAD:
            tl.atomic_add(_square(partial_ptr, strip * HEADS + head, BLOCK_N), sb, sem="relaxed")
        for c in range(0, DIM, BLOCK_D):
            vk = _load(vqkv, 1, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            gq = _wide_dot(gs, vk, none)
            k = _load(qkv, 1, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            gq = _wide_dot(sb, k, gq) * SCALE
            _store(gqkv, gq, 0, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            vq = _load(vqkv, 0, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            gk = _wide_dot(gs, vq, none, TRANSPOSED=True)
            q = _load(qkv, 0, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)
            gk = _wide_dot(sb, q, gk, TRANSPOSED=True) * SCALE
            _store(gqkv, gk, 1, c, 3, HEADS, TOKENS, DIM, BLOCK_N, BLOCK_D)


def _packed(qkv: Tensor) -> Tensor:
    """(3, B, H, N, D) -> (B, N, 3, H, D), contiguous: what a linear layer gave, uncopied."""
    return qkv.permute(1, 3, 0, 2, 4).contiguous()


def _single(o: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H, D), contiguous."""
    return o.transpose(1, 2).contiguous()


def _grid(qkv: Tensor, mask: Tensor | None, programs: int = 1056) -> tuple[int, int]:
    """(heads, strips): a strip's windows share one mask, so that the number of strips is a multiple
    of the masks'. 1056 programs are 8 on each of an H200's 132 processors."""
    _, windows, heads, _, _ = qkv.shape
    masks = 1 if mask is None else mask.shape[0]
    return heads, masks * max(1, min(programs // (heads * masks), windows // masks))


def _constants(qkv: Tensor, scale: float) -> dict:
    _, _, heads, tokens, dim = qkv.shape
    return {
        "HEADS": heads,
        "TOKENS": tokens,
        "DIM": dim,
        "SCALE": scale,
        "WIDE": tl_wide(qkv.dtype),
        "BLOCK_N": _block(qkv),
        "BLOCK_D": min(32, max(16, triton.next_power_of_2(dim))),
        "num_warps": 4,
        "num_stages": 1,
        **LAUNCH,
    }


def _block(qkv: Tensor) -> int:
    return max(16, triton.next_power_of_2(qkv.shape[3]))


def _added(qkv: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """What is added to the products of queries and keys: bias + mask for each mask and head, padded
    to a tile (-inf bars the padding's keys, and its queries see the window, not nothing), so that
    programs read it in whole lines at constant offsets."""
    _, _, heads, tokens, _ = qkv.shape
    block, masks = _block(qkv), 1 if mask is None else mask.shape[0]
    added = qkv.new_zeros((masks, heads, block, block), dtype=wide(qkv.dtype))
    added[..., tokens:] = -torch.inf
    for term in (bias, mask if mask is None else mask[:, None]):
        if term is not None:
            added[:, :, :tokens, :tokens] += term
    return added


def _padded(vbias: Tensor, qkv: Tensor) -> Tensor:
    more = _block(qkv) - vbias.shape[-1]
    padded = torch.nn.functional.pad(vbias.to(wide(qkv.dtype)), (0, more, 0, more))
    return padded.contiguous()  # padding by nothing keeps the strides


def _partials(qkv: Tensor, learned: Tensor | None, grid: tuple[int, int]) -> Tensor:
    heads, strips = grid
    shape = (strips if learned is not None else 0, heads, _block(qkv), _block(qkv))
    return torch.zeros(shape, dtype=wide(qkv.dtype), device=qkv.device)


def _sum(partials: Tensor, learned: Tensor) -> Tensor:
    tokens = learned.shape[-1]
    return partials[:, :, :tokens, :tokens].sum(0).to(learned.dtype)


def launch_forward(
    qkv: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, o: Tensor
) -> None:
    """Writes o."""
    added = _added(qkv, bias, mask)
    _window_attention_fwd_kernel[_grid(qkv, mask)](
        _packed(qkv), added, o, qkv.shape[1], added.shape[0], **_constants(qkv, scale)
    )


def launch_backward(
    go: Tensor, qkv: Tensor, more: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    scale: float, learned: Tensor | None, gqkv: Tensor,
) -> Tensor | None:  # fmt: skip
    """Writes gqkv + more; returns the gradient of `learned`."""
    added, packed = _added(qkv, bias, mask), _packed(qkv)
    grid = _grid(qkv, mask)
    sums = _partials(qkv, learned, grid)
    _window_attention_bwd_kernel[grid](
        _single(go), packed, packed if more is None else _packed(more), added, gqkv, sums,
        qkv.shape[1], added.shape[0], **_constants(qkv, scale), BIAS_GRAD=learned is not None,
        HAS_MORE=more is not None,
    )  # fmt: skip
    return None if learned is None else _sum(sums, learned)


def launch_backward_backward(
    vqkv: Tensor, vbias: Tensor | None, go: Tensor, qkv: Tensor, bias: Tensor | None,
    mask: Tensor | None, scale: float, learned: Tensor | None, ggo: Tensor, gqkv: Tensor,
) -> Tensor | None:  # fmt: skip
    """Writes ggo and gqkv; returns the gradient of `learned`."""
    added = _added(qkv, bias, mask)
    grid = _grid(qkv, mask)
    sums = _partials(qkv, learned, grid)
    _window_attention_bwd_bwd_kernel[grid](
        _packed(vqkv), added if vbias is None else _padded(vbias, qkv), _single(go), _packed(qkv),
        added, ggo, gqkv, sums, qkv.shape[1], added.shape[0], **_constants(qkv, scale),
        BIAS_GRAD=learned is not None, HAS_VB=vbias is not None,
    )  # fmt: skip
    return None if learned is None else _sum(sums, learned)
