"""Queries and keys rotated by their positions, rows of no sequence zeroed: what attention of other makes needs first.

One Triton kernel where Triton is at hand and has shown here that it is right, else eight operators of torch.
"""

import functools
import importlib.util
import warnings

import torch

LOWEST_CAPABILITY = (8, 0)  # of a GPU that Triton supports


class _Arrange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv_N3HK, tables, own_N, before, after):
        ctx.tables, ctx.before = tables, before
        ctx.save_for_backward(own_N)
        out = qkv_N3HK.new_empty(before + len(qkv_N3HK) + after, *qkv_N3HK.shape[1:])
        return _write(out, qkv_N3HK.contiguous(), tables, own_N, before, 1)

    @staticmethod
    def backward(ctx, dout):
        (own_N,) = ctx.saved_tensors
        dqkv_N3HK = dout.new_empty(len(own_N), *dout.shape[1:])
        _write(dqkv_N3HK, dout.contiguous(), ctx.tables, own_N, -ctx.before, -1)
        return dqkv_N3HK, None, None, None, None


def arrange(qkv_N3HK, places, rotary=None, before=0, after=0):
    """(before + N + after, 3, H, K): rotated queries and keys, values; zeros in rows of no sequence and around them.

    Args:
        qkv_N3HK: as varlen_attention takes it; whatever stands in rows of no sequence.
        places: Places of the batch.
        rotary: (cos, sin) by position, or None.
        before, after: rows of zeros to add.

    The gradient of rows of no sequence is zero, whatever comes back for them.
    """
    tables = None
    if rotary is not None:
        tables = places.rotary(rotary, torch.float32 if fuses(qkv_N3HK) else qkv_N3HK.dtype)
    return _Arrange.apply(qkv_N3HK, tables, places.own_N, before, after)


def _write(out, x, tables, own_N, shift, direction):
    """out[n + shift] = x[n], rotated forwards (1) or backwards (-1), for the rows n that both have; else zero.

    The tables and own_N go by the shorter one's rows: forwards x has them, backwards out.
    """
    if out.numel() and fuses(x):
        launch(out, x, tables, own_N, shift, direction)
        return out
    N = len(own_N)
    if direction == 1:
        target, source = out[shift : shift + N], x
        out[:shift].zero_()
        out[shift + N :].zero_()
    else:
        target, source = out, x[-shift : N - shift]
    if tables is None:
        target.copy_(source)
    else:
        cos, sin = (table[:, None, None] for table in tables)
        (a, b), (ra, rb) = (t[:, :2].chunk(2, dim=-1) for t in (source, target))
        torch.mul(a, cos, out=ra).addcmul_(b, sin, value=-direction)
        torch.mul(b, cos, out=rb).addcmul_(a, sin, value=direction)
        target[:, 2].copy_(source[:, 2])
    target.masked_fill_(~own_N[:, None, None, None], 0)
    return out


def launch(out, x, tables, own_N, shift, direction):
    """_write by the Triton kernel."""
    from cramfast.kernels import triton_arrange

    triton_arrange.arrange(out, x, tables, own_N, shift, direction)


def fuses(x):
    """Whether the Triton kernel takes tensors like this one: it is compared with torch's operators at its first use."""
    if x.device.type != "cuda" or x.dtype == torch.float64:
        return False
    return _fuses(x.device.index, x.dtype, *x.shape[2:])


@functools.cache
def _fuses(device, dtype, H, K):
    if torch.cuda.get_device_capability(device) < LOWEST_CAPABILITY or importlib.util.find_spec("triton") is None:
        return False
    try:
        with torch.cuda.device(device), torch.no_grad():
            return agrees("cuda", dtype, H, K)
    except Exception as error:  # a compiler that is missing, a driver that is too old: torch's operators do it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"attention rotates in PyTorch's operators: the Triton kernel failed ({reason})", stacklevel=2)
        return False


def agrees(device, dtype, H, K):
    """Whether the Triton kernel gives what torch's operators give in float32, both ways; warns where it does not."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(9, 3, H, K, generator=generator, device=device).to(dtype)
    angle = torch.rand(9, K // 2, generator=generator, device=device) * 6
    own_N, tables = torch.arange(9, device=device) < 7, (angle.cos(), angle.sin())
    for shift, direction, rows in ((4, 1, 16), (0, -1, 9)):
        ours, truth = x.new_full((rows, 3, H, K), torch.nan), torch.empty(rows, 3, H, K, device=device)
        launch(ours, x, tables, own_N, shift, direction)
        eager = _eager_truth(truth, x.float(), tables, own_N, shift, direction)
        if not torch.allclose(ours.float(), eager, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps):
            warnings.warn("attention rotates in PyTorch's operators: the Triton kernel was wrong here", stacklevel=2)
            return False
    return True


def _eager_truth(out, x, tables, own_N, shift, direction):
    """What _write is to give, from its definition."""
    cos, sin = (table[:, None, None] for table in tables)
    a, b = x[:, :2].chunk(2, dim=-1)
    turned = torch.cat([a * cos - direction * b * sin, b * cos + direction * a * sin], -1)
    rows = torch.cat([turned, x[:, 2:]], 1) * own_N[:, None, None, None]
    out.zero_()[shift : shift + len(x)] = rows
    return out
