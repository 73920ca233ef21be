"""Triton source of the attention of few queries to many keys.

    s = q k^T / sqrt(C)            o = softmax(s) v

Each program takes a range of the keys of one head and keeps R rows of queries in registers. It writes, of its range,
a = sum_j 2^(s_j - m) v_j and the logarithm m + log2(sum_j 2^(s_j - m)) to base 2, where m is the largest s_j. The second kernel
joins the ranges of a row. Ranges depend on the number of keys alone, so that a row's bits do not depend on the batch. Keys and
values are read once; scores never leave the registers. Offsets of keys are 64 bits wide.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M", "keys_per_program"])
def split_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, part_ptr: tl.tensor, log_ptr: tl.tensor,
    M: tl.tensor, G: tl.tensor, R: tl.tensor, C: tl.tensor, keys_per_program: tl.tensor, scale: tl.tensor,
    k_batch: tl.tensor, k_head: tl.tensor, k_row: tl.tensor, v_batch: tl.tensor, v_head: tl.tensor, v_row: tl.tensor,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Compute the part (R, C) and the logarithm (R,) of a range of keys; q is (B G, R, C), k and v (B, G, M, C).

    `scale` holds log2(e) / sqrt(C). WIDEN multiplies in float32, for the interpreter, which cannot in bfloat16.
    """
    split, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, group = head // G, head % G
    r, c, j = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_M)
    inside = (r[:, None] < R) & (c[None, :] < C)
    rows = r[:, None] * C + c[None, :]
    q = tl.load(q_ptr + head * R * C + rows, mask=inside, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    k_ptr += batch * k_batch + group * k_head
    v_ptr += batch * v_batch + group * v_head
    first = split * keys_per_program
    end = tl.minimum(first + keys_per_program, M)
    m = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    part = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(first, end, BLOCK_M):
        key = (start + j).to(tl.int64)
        there = key < end
        k = tl.load(k_ptr + key[None, :] * k_row + c[:, None], mask=there[None, :] & (c[:, None] < C), other=0.0)
        s = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
        s = tl.where(there[None, :], s, -float("inf"))
        above = tl.maximum(m, tl.max(s, axis=1))
        fade, p = tl.exp2(m - above), tl.exp2(s - above[:, None])
        v = tl.load(v_ptr + key[:, None] * v_row + c[None, :], mask=there[:, None] & (c[None, :] < C), other=0.0)
        part = part * fade[:, None] + tl.dot(p.to(q.dtype), v.to(q.dtype), input_precision="ieee")
        total = total * fade + tl.sum(p, axis=1)
        m = above
    place = head * tl.num_programs(0) + split
    tl.store(part_ptr + place * R * C + rows, part / total[:, None], mask=inside)
    tl.store(log_ptr + place * R + r, m + tl.log2(total), mask=r < R)


@triton.jit
def join_kernel(
    part_ptr: tl.tensor, log_ptr: tl.tensor, out_ptr: tl.tensor, splits: tl.tensor, R: tl.tensor, C: tl.tensor,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute out (B G, R, C) of parts (B G, splits, R, C) and logarithms (B G, splits, R): a row a program."""
    head, r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, c = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_C)
    logs = tl.load(log_ptr + (head * splits + s) * R + r, mask=s < splits, other=-float("inf"))
    weight = tl.exp2(logs - tl.max(logs, axis=0))
    inside = (s[:, None] < splits) & (c[None, :] < C)
    parts = tl.load(part_ptr + ((head * splits + s[:, None]) * R + r) * C + c[None, :], mask=inside, other=0.0)
    out = tl.sum(parts * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    tl.store(out_ptr + (head * R + r) * C + c, out.to(out_ptr.dtype.element_ty), mask=c < C)
