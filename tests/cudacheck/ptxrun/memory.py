"""Simulated memories with per-access checks and traffic counters.

Global memory is one byte arena.  Every buffer is 256-byte aligned like cudaMalloc's, with an unmapped
red zone on both sides; a state byte per memory byte says mapped / initialised / written in this launch.

The first PARAMETERS bytes of the arena are for the parameters of the kernel that runs, the next VARIABLES for
the variables of modules.  They lie at the same addresses in every arena, so that a kernel is linked once.
"""

import numpy as np

MAPPED, INIT, WRITTEN, READONLY, BY_DEVICE = 1, 2, 4, 8, 16
STORED = INIT | WRITTEN | BY_DEVICE  # what a store of a kernel sets; WRITTEN is cleared before every launch
BASE = 0x7F40_0000_0000  # > 32 bits, so truncated pointers are caught
SHARED_WINDOW = 0x0100_0000_0000_0000  # generic addresses of shared and local memory
LOCAL_WINDOW = 0x0200_0000_0000_0000
VBASE = 0x7FC0_0000_0000  # buffers without storage (Device.virtual): huge sizes for index tests
RED = 512
PARAMETERS, VARIABLES = 32768, 1 << 16
VARIABLES_AT = BASE + (RED + PARAMETERS + RED + 255) // 256 * 256
U = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
REP = {1: 0x01, 2: 0x0101, 4: 0x01010101, 8: 0x0101010101010101}


class Buffer:
    def __init__(self, mem, name, addr, nbytes, dtype, shape):
        self.mem, self.name, self.addr, self.nbytes, self.dtype, self.shape = (
            mem,
            name,
            addr,
            nbytes,
            dtype,
            shape,
        )

    def numpy(self):
        o = self.addr - BASE
        return self.mem.data[o : o + self.nbytes].view(self.dtype).reshape(self.shape).copy()

    def initialised(self):
        """Bool per byte: whether anybody ever wrote it, the host's `put` included."""
        return self._has(INIT)

    def written(self):
        """Bool per byte: whether a kernel, or a memory call of the launch code, ever wrote it."""
        return self._has(BY_DEVICE)

    def _has(self, bit):
        o = self.addr - BASE
        return (self.mem.state[o : o + self.nbytes] & bit) != 0


class Global:
    def __init__(self):
        self.top = 0
        self.data = self.state = np.zeros(0, np.uint8)
        self.writer = None
        self.buffers, self.virtuals, self.vtop = [], [], VBASE
        self.top = RED
        self.parameters = self.alloc(PARAMETERS, "(params)")
        self.reserve(VARIABLES_AT - BASE + VARIABLES)

    def virtual(self, nbytes, name, fill):
        v = Virtual(name, self.vtop, nbytes, fill)
        self.virtuals.append(v)
        self.vtop += (nbytes + RED + 255) // 256 * 256 + 256
        return v

    def alloc(self, nbytes, name="", dtype=np.uint8, shape=None, offset=0):
        """offset: shift the start by so many bytes (to test misaligned views)."""
        start = (self.top + 255) // 256 * 256 + offset
        self.reserve(start + nbytes + RED)
        return self._buffer(start, nbytes, name, dtype, shape)

    def reserve(self, top):
        """Let the arena reach to `top`."""
        self.top = top
        if self.top > len(self.data):
            grow = max(self.top, 2 * len(self.data)) // 256 * 256 + 256
            for k in ("data", "state"):
                old = getattr(self, k)
                new = np.zeros(grow, np.uint8)
                new[: len(old)] = old
                setattr(self, k, new)

    def _buffer(self, start, nbytes, name, dtype, shape):
        self.state[start : start + nbytes] = MAPPED
        b = Buffer(
            self, name or f"buf{len(self.buffers)}", BASE + start, nbytes, np.dtype(dtype), shape or (nbytes,)
        )
        self.buffers.append(b)
        return b

    def put(self, array, name="", offset=0, readonly=False):
        a = np.ascontiguousarray(array)
        return self._fill(self.alloc(a.nbytes, name, a.dtype, a.shape, offset), a, readonly)

    def place(self, address, array, name):
        """`put` at an address within what was reserved."""
        return self._fill(self._buffer(address - BASE, array.nbytes, name, array.dtype, array.shape), array)

    def _fill(self, b, a, readonly=False):
        o = b.addr - BASE
        self.data[o : o + a.nbytes] = a.reshape(-1).view(np.uint8)
        self.state[o : o + a.nbytes] = MAPPED | INIT | (READONLY if readonly else 0)
        return b

    def find(self, addr):
        best = None
        for b in self.buffers + self.virtuals:
            if (
                b.addr - RED <= addr < b.addr + b.nbytes + RED
                and (best is None or abs(b.addr - addr) < abs(best.addr - addr))
                and (best is None or b.addr <= addr)
            ):
                best = b
        if best is None:
            return f"{addr:#x} (no buffer near)"
        return f"{best.name}[{addr - best.addr:+d} of {best.nbytes} bytes]"


class Virtual:
    """A buffer of any size without storage: reads give fill(byte offsets, width) or 0, writes are logged."""

    def __init__(self, name, addr, nbytes, fill):
        self.name, self.addr, self.nbytes, self.fill, self.log = name, addr, nbytes, fill, []

    def writes(self, dtype):
        """-> (element indices, values) of everything written."""
        i, v = [], []
        for off, vals in self.log:
            flat = np.ascontiguousarray(vals).view(dtype)
            i.append((off[:, None] // np.dtype(dtype).itemsize + np.arange(flat.shape[1])).reshape(-1))
            v.append(flat.reshape(-1))
        return np.concatenate(i), np.concatenate(v)


class Traffic:
    """Per (buffer, load/store) counters, filled per warp request."""

    def __init__(self):
        self.rows = {}

    def row(self, key):
        if key not in self.rows:
            self.rows[key] = dict(requests=0, threads=0, bytes=0, sectors=0)
        return self.rows[key]


def count_sectors(warp, addr, nbytes):
    """Number of (warp, 32-byte sector) pairs and of warps touched by one instruction."""
    first, last = addr >> np.uint64(5), (addr + np.uint64(nbytes - 1)) >> np.uint64(5)
    key = (warp.astype(np.uint64) << np.uint64(44)) | (first & np.uint64((1 << 44) - 1))
    if len(key) > 1 and not (key[1:] >= key[:-1]).all():
        key = np.sort(key)
    sectors = 1 + int(np.count_nonzero(key[1:] != key[:-1])) if len(key) else 0
    sectors += int(np.count_nonzero(last != first))  # only misaligned accesses straddle
    warps = 1 + int(np.count_nonzero(warp[1:] != warp[:-1])) if len(warp) else 0
    return sectors, warps
