"""Attention within windows of at most 64 tokens, as Swin's, three orders.

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

from fastgn_kernels import reference
from fastgn_kernels.dispatch import (
    INTERPRETED,
    LAUNCH,
    capability,
    define,
    differentiable,
    inlines,
    is_floating,
    no_forward_mode,
    no_third_derivative,
    runs_triton,
    tl_wide,
    wide,
)

LARGEST = 64
"""Tokens of a window, and channels of a head."""


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


def _outputs(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Room for something like qkv and something like o, laid out as linear layers want them."""
    _, windows, heads, tokens, dim = qkv.shape
    like_qkv = qkv.new_empty(windows, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4)
    return like_qkv, qkv.new_empty(windows, tokens, heads, dim).transpose(1, 2)


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


def _kernel_runs(qkv: Tensor) -> bool:
    """Triton's products in float32 proper, and all on Volta, whose tensor cores it no longer knows,
    spill thousands of bytes of registers a thread: left to PyTorch's operators."""
    if not runs_triton(qkv) or INTERPRETED:
        return runs_triton(qkv)
    return qkv.dtype in (torch.float16, torch.bfloat16) and capability(qkv) >= 80


def _padded(vbias: Tensor, qkv: Tensor) -> Tensor:
    more = _block(qkv) - vbias.shape[-1]
    padded = torch.nn.functional.pad(vbias.to(wide(qkv.dtype)), (0, more, 0, more))
    return padded.contiguous()  # padding by nothing keeps the strides


def _bias_output(qkv: Tensor, learned: Tensor | None) -> Tensor:
    """Room for the gradient of `learned`, the bias where its gradient is asked for; else empty:
    custom ops return tensors."""
    return qkv.new_empty(0) if learned is None else learned.new_empty(learned.shape)


def _forward(qkv: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    if not _kernel_runs(qkv):
        return _forward_plain(qkv, bias, mask, scale)
    _, o = _outputs(qkv)
    if qkv.numel():
        added = _added(qkv, bias, mask)
        _window_attention_fwd_kernel[_grid(qkv, mask)](
            _packed(qkv), added, o, qkv.shape[1], added.shape[0], **_constants(qkv, scale)
        )
    return o


def _softmax_plain(
    q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    s = scale * (q @ k.mT)
    if bias is not None:
        s = s + bias.to(s.dtype)
    if mask is not None:
        masks, mask = mask.shape[0], mask[:, None].to(s.dtype)
        s = (s.unflatten(0, (s.shape[0] // masks, masks)) + mask).flatten(0, 1)
    return s.softmax(-1)


def _forward_plain(qkv: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    q, k, v = qkv.to(wide(qkv.dtype))
    return _outputs(qkv)[1].copy_(_softmax_plain(q, k, bias, mask, scale) @ v)


def _backward(
    go: Tensor, qkv: Tensor, more: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    scale: float, weight_grads: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gqkv + more, gbias); the last is empty without weight_grads."""
    learned = bias if weight_grads else None
    if not _kernel_runs(qkv):
        return _backward_plain(go, qkv, more, bias, mask, scale, learned)
    gqkv, gbias = _outputs(qkv)[0], _bias_output(qkv, learned)
    if not qkv.numel():
        return gqkv, gbias.zero_()
    added, packed = _added(qkv, bias, mask), _packed(qkv)
    grid = _grid(qkv, mask)
    sums = _partials(qkv, learned, grid)
    _window_attention_bwd_kernel[grid](
        _single(go), packed, packed if more is None else _packed(more), added, gqkv, sums,
        qkv.shape[1], added.shape[0], **_constants(qkv, scale), BIAS_GRAD=learned is not None,
        HAS_MORE=more is not None,
    )  # fmt: skip
    return gqkv, gbias if learned is None else _sum(sums, learned)


def _partials(qkv: Tensor, learned: Tensor | None, grid: tuple[int, int]) -> Tensor:
    heads, strips = grid
    shape = (strips if learned is not None else 0, heads, _block(qkv), _block(qkv))
    return torch.zeros(shape, dtype=wide(qkv.dtype), device=qkv.device)


def _sum(partials: Tensor, learned: Tensor) -> Tensor:
    tokens = learned.shape[-1]
    return partials[:, :, :tokens, :tokens].sum(0).to(learned.dtype)


def _backward_plain(
    go: Tensor, qkv: Tensor, more: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    scale: float, learned: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = qkv.to(wide(qkv.dtype))
    go = go.to(q.dtype)
    p = _softmax_plain(q, k, bias, mask, scale)
    gp = go @ v.mT
    gs = p * (gp - (p * gp).sum(-1, keepdim=True))
    gqkv = _outputs(qkv)[0]
    for into, value in zip(
        gqkv.unbind(), (scale * gs @ k, scale * gs.mT @ q, p.mT @ go), strict=True
    ):
        into.copy_(value)
    if more is not None:
        gqkv += more
    gbias = _bias_output(qkv, learned)
    return gqkv, gbias if learned is None else gbias.copy_(gs.sum(0))


def _backward_backward(
    vqkv: Tensor, vbias: Tensor | None, go: Tensor, qkv: Tensor, bias: Tensor | None,
    mask: Tensor | None, scale: float, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(ggo, gqkv, gbias); the last is empty without weight_grads."""
    learned = bias if weight_grads else None
    if not _kernel_runs(qkv):
        return _backward_backward_plain(vqkv, vbias, go, qkv, bias, mask, scale, learned)
    (gqkv, ggo), gbias = _outputs(qkv), _bias_output(qkv, learned)
    if not qkv.numel():
        return ggo, gqkv, gbias.zero_()
    added = _added(qkv, bias, mask)
    grid = _grid(qkv, mask)
    sums = _partials(qkv, learned, grid)
    _window_attention_bwd_bwd_kernel[grid](
        _packed(vqkv), added if vbias is None else _padded(vbias, qkv), _single(go), _packed(qkv),
        added, ggo, gqkv, sums, qkv.shape[1], added.shape[0], **_constants(qkv, scale),
        BIAS_GRAD=learned is not None, HAS_VB=vbias is not None,
    )  # fmt: skip
    return ggo, gqkv, gbias if learned is None else _sum(sums, learned)


def _backward_backward_plain(
    vqkv: Tensor, vbias: Tensor | None, go: Tensor, qkv: Tensor, bias: Tensor | None,
    mask: Tensor | None, scale: float, learned: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = qkv.to(wide(qkv.dtype))
    vq, vk, vv = vqkv.to(q.dtype)
    go = go.to(q.dtype)
    p = _softmax_plain(q, k, bias, mask, scale)
    t = scale * (vq @ k.mT + q @ vk.mT)
    if vbias is not None:
        t = t + vbias.to(t.dtype)
    t = t - (p * t).sum(-1, keepdim=True)
    gp = go @ v.mT
    gp = gp - (p * gp).sum(-1, keepdim=True)
    pt, gs = p * t, p * gp
    u = gp * t + go @ vv.mT  # short of U by a constant a row, which drops out of Sb
    sb = p * (u - (p * u).sum(-1, keepdim=True))
    gqkv, ggo = _outputs(qkv)
    values = (scale * (sb @ k + gs @ vk), scale * (sb.mT @ q + gs.mT @ vq), pt.mT @ go)
    for into, value in zip(gqkv.unbind(), values, strict=True):
        into.copy_(value)
    gbias = _bias_output(qkv, learned)
    ggo.copy_(pt @ v + p @ vv)
    return ggo, gqkv, gbias if learned is None else gbias.copy_(sb.sum(0))


def _stand_in(qkv: Tensor) -> Tensor:
    """One element of memory in the shape of qkv. The backward depends on qkv through it, so that
    what the second derivative has for qkv comes to the last backward, whose kernel adds it to its
    own in passing, and not beside it: Inductor's sum took 15 passes over the width of a block, the
    last kernel takes 3."""
    return qkv.new_zeros(1).expand(qkv.shape)


@define("fastgn::window_attention")
def _window_attention(
    qkv: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _forward(qkv, bias, mask, scale), _stand_in(qkv)


@define("fastgn::window_attention_bwd")
def _window_attention_bwd(
    go: Tensor, qkv: Tensor, stand_in: Tensor | None, more: Tensor | None, bias: Tensor | None,
    mask: Tensor | None, scale: float, weight_grads: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _backward(go, qkv, more, bias, mask, scale, weight_grads)


@define("fastgn::window_attention_bwd_bwd")
def _window_attention_bwd_bwd(
    vqkv: Tensor, vbias: Tensor | None, go: Tensor, qkv: Tensor, bias: Tensor | None,
    mask: Tensor | None, scale: float, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward_backward(vqkv, vbias, go, qkv, bias, mask, scale, weight_grads)


@_window_attention.register_fake
def _(qkv: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _outputs(qkv)[1], _stand_in(qkv)


@_window_attention_bwd.register_fake
def _(
    go: Tensor, qkv: Tensor, stand_in: Tensor | None, more: Tensor | None, bias: Tensor | None,
    mask: Tensor | None, scale: float, weight_grads: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _outputs(qkv)[0], _bias_output(qkv, bias if weight_grads else None)


@_window_attention_bwd_bwd.register_fake
def _(
    vqkv: Tensor, vbias: Tensor | None, go: Tensor, qkv: Tensor, bias: Tensor | None,
    mask: Tensor | None, scale: float, weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gqkv, ggo = _outputs(qkv)
    return ggo, gqkv, _bias_output(qkv, bias if weight_grads else None)


def _differentiate(
    options: tuple, saved: tuple, wanted: tuple[bool, ...], go: Tensor | None, more: Tensor | None
) -> tuple:
    qkv, bias, mask, stand_in = saved
    if go is None:
        return more, None, None, None
    if not torch.is_grad_enabled():
        stand_in = None  # the last backward
    gqkv, gbias = _window_attention_bwd(go, qkv, stand_in, more, bias, mask, options[-1], wanted[1])
    return gqkv, gbias if wanted[1] else None, None, None


def _differentiate_twice(
    options: tuple, saved: tuple, wanted: tuple[bool, ...],
    vqkv: Tensor | None, vbias: Tensor | None,
) -> tuple:  # fmt: skip
    go, qkv, bias, mask = saved
    filled = torch.zeros_like(qkv) if vqkv is None else vqkv
    scale, had_bias_grad = options[-2:]
    ggo, gqkv, gbias = _window_attention_bwd_bwd(
        filled, vbias if had_bias_grad else None, go, qkv, bias, mask, scale, wanted[4]
    )
    to_qkv = (None, gqkv) if wanted[2] else (gqkv, None)
    to_more, to_bias = vqkv if wanted[3] else None, gbias if wanted[4] else None
    return ggo, *to_qkv, to_more, to_bias, None, None, None


differentiable(
    _window_attention,
    "window_attention",
    save=lambda inputs, outputs: (*inputs[:3], outputs[1]),
    backward=_differentiate,
)
differentiable(
    _window_attention_bwd,
    "window_attention",
    save=lambda inputs, outputs: (*inputs[:2], *inputs[4:6]),
    backward=_differentiate_twice,
)
no_third_derivative(_window_attention_bwd_bwd, "window_attention")


def window_attention_qkvpacked(
    qkv: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale Q K^T + bias + mask) V in each window, one pass for each of three orders.

    qkv: (3, B, H, N, D) for B windows of N <= 64 tokens and H heads of D <= 64 channels; a linear
    layer's (B, N, 3 H D), seen as that through a view, is read and its gradient written without a
    copy. bias: (H, N, N), Swin's relative-position bias, with its gradient. mask: (W, N, N), added
    to window i as mask[i % W], without one; -inf bars a pair. scale: None for D ** -0.5.
    Returns (B, H, N, D), whose transpose(1, 2).flatten(2) is a view. Under autocast the products
    take its dtype, as F.scaled_dot_product_attention's. Source: Liu et al. 2021, arXiv 2103.14030.

    Stays one op in a compiled region where its kernels run. Raises ValueError on shapes that do not
    fit, TypeError on integers; a third derivative raises RuntimeError.
    """
    name = "window_attention"
    if qkv.dim() != 5 or qkv.shape[0] != 3:
        raise ValueError(f"{name}: qkv is {tuple(qkv.shape)}, should be (3, B, H, N, D)")
    _, windows, heads, tokens, dim = qkv.shape
    if not (0 < tokens <= LARGEST and 0 < dim <= LARGEST):
        raise ValueError(f"{name}: N = {tokens} and D = {dim} should be 1 to {LARGEST}")
    if bias is not None and bias.shape != (heads, tokens, tokens):
        raise ValueError(
            f"{name}: bias is {tuple(bias.shape)}, should be {(heads, tokens, tokens)}"
        )
    if mask is not None:
        if mask.dim() != 3 or mask.shape[1:] != (tokens, tokens) or not mask.shape[0]:
            raise ValueError(
                f"{name}: mask is {tuple(mask.shape)}, should be (W, {tokens}, {tokens})"
            )
        if windows % mask.shape[0]:
            raise ValueError(f"{name}: {windows} windows are no multiple of {mask.shape[0]} masks")
        if mask.requires_grad:
            raise ValueError(f"{name}: the mask has no gradient; add a learned one to the bias")
    is_floating(name, qkv=qkv, bias=bias, mask=mask)
    if torch.is_autocast_enabled(qkv.device.type) and qkv.dtype != torch.float64:
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
    scale = dim**-0.5 if scale is None else scale
    if inlines() and not _kernel_runs(qkv):
        q, k, v = qkv.unbind()
        return reference.window_attention(q, k, v, bias, mask, scale)
    no_forward_mode(name, qkv, bias, mask)
    return _window_attention(qkv, bias, mask, scale)[0]


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`window_attention_qkvpacked` of three (B, H, N, D) tensors, which it has to copy together."""
    if not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"window_attention: q, k, v are {shapes}, should be of one shape")
    return window_attention_qkvpacked(torch.stack((q, k, v)), bias, mask, scale)
