"""Arithmetic of the PTX instructions, vectorised over threads.

`build(ins)` returns (fn, source types, destination type) for every instruction that only reads and
writes registers.  Values arrive as NumPy arrays of the named type (f16: float16; bf16: float32 that
holds a bf16 value; pred: bool) and leave in the destination type.

Exactness: add/sub/mul/div/sqrt/rcp/fma with .rn/.rz/.rm/.rp on f32/f16/bf16 are correctly rounded
(computed in f64 with round-to-odd).  f64 fma is exact except for double-rounding ties.  The .approx
functions (ex2, lg2, sin, cos, rcp, rsqrt, sqrt, tanh, div.full) are computed in f64 and rounded once:
hardware differs from that by the few ulp the PTX manual states.
"""

import numpy as np

NP = {
    "pred": np.bool_,
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.float16,
    "bf16": np.uint16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
}
FLOATS = {"f16", "bf16", "f32", "f64"}
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
RND = {"rn", "rz", "rm", "rp", "rna"}
f32, f64, u32, u64, i64 = np.float32, np.float64, np.uint32, np.uint64, np.int64


# ---- bf16 and rounding ------------------------------------------------------------------------
def bf16_up(bits):
    return (bits.astype(u32) << u32(16)).view(f32)


def step(x, up):
    """Neighbouring float towards +inf (up) or -inf, elementwise."""
    return np.nextafter(x, np.where(up, np.inf, -np.inf).astype(x.dtype))


def to_bf16_bits(x, rnd="rn"):
    x = np.asarray(x)
    if x.dtype != f32:
        x = odd_to(x, f32, "odd")
    b = x.view(u32)
    hi = b >> u32(16)
    low = b & u32(0xFFFF)
    if rnd == "rn":
        up = (low > 0x8000) | ((low == 0x8000) & ((hi & 1) == 1))
    elif rnd == "rna":
        up = low >= 0x8000
    elif rnd == "rz":
        up = np.zeros(b.shape, bool)
    else:
        neg = (b >> u32(31)) == 1
        up = (low != 0) & (neg if rnd == "rm" else ~neg)
    r = hi + up.astype(u32)
    return np.where(np.isnan(x), u32(0x7FFF), r).astype(np.uint16)


def odd_sum(a, b):
    """a + b in f64 rounded to odd (so that one later rounding to <= 51 bits is the correct one)."""
    s = a + b
    bb = s - a
    err = (a - (s - bb)) + (b - bb)
    bits = s.view(i64) if isinstance(s, np.ndarray) else np.asarray(s).view(i64)
    fix = (err != 0) & ((bits & 1) == 0) & np.isfinite(s)
    delta = np.where((err > 0) == (s > 0), 1, -1)
    return np.where(fix, bits + np.where(fix, delta, 0), bits).view(f64)


def odd_to(x, dtype, rnd="rn"):
    """f64 (exact or rounded to odd) -> f32/f16 with rounding mode."""
    r = x.astype(dtype)
    if rnd == "rn":
        return r
    w = r.astype(f64)
    if rnd == "rm":
        fix = w > x
        return np.where(fix, step(r, False), r)
    if rnd == "rp":
        fix = w < x
        return np.where(fix, step(r, True), r)
    fix = np.abs(w) > np.abs(x)
    r = np.where(fix, step(r, x < 0), r)  # rz
    if rnd == "odd":
        inexact = (r.astype(f64) != x) & np.isfinite(x)
        b = r.view(u32)
        return np.where(inexact, b | u32(1), b).view(f32)
    return r


def narrow(x, t, rnd="rn", sat=False, relu=False):
    """f64 intermediate (exact / odd) -> value in register representation of float type t."""
    if sat:
        x = np.where(np.isnan(x), 0.0, np.clip(x, 0.0, 1.0))
    if relu:
        x = np.where(np.isnan(x), x, np.maximum(x, 0.0))
    if t == "f64":
        return x
    if t == "bf16":
        return to_bf16_bits(odd_to(x, f32, "odd"), rnd)
    return odd_to(x, NP[t], rnd)


def widen(x, t):
    if t == "bf16":
        return bf16_up(np.asarray(x)).astype(f64)
    return np.asarray(x).astype(f64)


def flush(x):
    tiny = np.abs(x) < f32(1.1754943508222875e-38)
    return np.where(tiny, np.copysign(f32(0), x), x)


def two_prod(a, b):
    p = a * b
    c = 134217729.0
    t = c * a
    ah = t - (t - a)
    al = a - ah
    t = c * b
    bh = t - (t - b)
    bl = b - bh
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def fma(a, b, c, t, rnd):
    if t == "f64":
        p, e = two_prod(a, b)
        r = p + c
        bb = r - p
        err = (p - (r - bb)) + (c - bb)
        out = r + (err + e)
        return np.where(np.isfinite(out), out, p + c)
    return odd_sum(widen(a, t) * widen(b, t), widen(c, t))


# ---- float ops ----------------------------------------------------------------------------------
def float_op(name, t, m):
    rnd = next((x for x in m if x in RND), "rn")
    sat, relu, ftz = "sat" in m, "relu" in m, "ftz" in m and t == "f32"

    def wrap(core):
        def fn(*xs):
            if ftz:
                xs = [flush(x) for x in xs]
            r = narrow(core(*xs), t, rnd, sat, relu)
            return flush(r) if ftz else r

        return fn

    if t == "f32" and rnd == "rn" and not (sat or relu or ftz) and name in ("add", "sub", "mul", "div"):
        return {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[name]
    if t == "f64":
        simple = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
        if name in simple:
            return simple[name]

    def w(x):
        return widen(x, t)

    core = {
        "add": lambda a, b: odd_sum(w(a), w(b)),
        "sub": lambda a, b: odd_sum(w(a), -w(b)),
        "mul": lambda a, b: w(a) * w(b),
        "div": lambda a, b: w(a) / w(b),
        "fma": lambda a, b, c: fma(a, b, c, t, rnd),
        "mad": lambda a, b, c: fma(a, b, c, t, rnd),
        "rcp": lambda a: 1.0 / w(a),
        "sqrt": lambda a: np.sqrt(w(a)),
        "rsqrt": lambda a: 1.0 / np.sqrt(w(a)),
        "ex2": lambda a: np.exp2(w(a)),
        "lg2": lambda a: np.log2(w(a)),
        "sin": lambda a: np.sin(w(a)),
        "cos": lambda a: np.cos(w(a)),
        "tanh": lambda a: np.tanh(w(a)),
    }.get(name)
    if core:
        return wrap(core)
    if name in ("min", "max"):
        nan = "NaN" in m
        f = {("min", 0): np.fmin, ("max", 0): np.fmax, ("min", 1): np.minimum, ("max", 1): np.maximum}[
            name, int(nan)
        ]
        return wrap(lambda a, b: f(w(a), w(b)))
    if name in ("abs", "neg"):
        return wrap(lambda a: np.abs(w(a)) if name == "abs" else -w(a))
    if name == "copysign":
        return lambda a, b: np.copysign(b, a)
    raise NotImplementedError(f"{name}.{t}")


# ---- integer ops --------------------------------------------------------------------------------
def mulhi(a, b, t):
    bits = NP[t]().itemsize * 8
    if bits < 64:
        wide = i64 if t[0] == "s" else u64
        return ((np.asarray(a).astype(wide) * np.asarray(b).astype(wide)) >> wide(bits)).astype(NP[t])
    au, bu = np.asarray(a).view(u64), np.asarray(b).view(u64)
    m32, s32 = u64(0xFFFFFFFF), u64(32)
    al, ah, bl, bh = au & m32, au >> s32, bu & m32, bu >> s32
    t0 = al * bl
    t1 = ah * bl + (t0 >> s32)
    t2 = al * bh + (t1 & m32)
    hi = ah * bh + (t1 >> s32) + (t2 >> s32)
    if t[0] == "s":
        hi = hi - np.where(np.asarray(a) < 0, bu, u64(0)) - np.where(np.asarray(b) < 0, au, u64(0))
        return hi.view(i64)
    return hi


def shift(name, t):
    bits, ut, dt = NP[t]().itemsize * 8, NP["u" + t[1:]], NP[t]

    def fn(a, n):
        big = n >= bits
        k = np.where(big, 0, n).astype(ut)
        a = np.asarray(a)
        if name == "shl":
            r = a.view(ut) << k
            return np.where(big, ut(0), r).view(dt)
        if t[0] == "s":
            return np.where(big, a >> dt(bits - 1), a >> k.astype(dt)).astype(dt)
        return np.where(big, ut(0), a.view(ut) >> k).view(dt)

    return fn


def divrem(name, dt):
    signed = np.issubdtype(dt, np.signedinteger)

    def fn(a, b):
        a, b = np.broadcast_arrays(a, b)
        bz = b == 0
        bb = np.where(bz, dt(1), b)
        q = a // bb
        if signed:  # PTX truncates, NumPy floors
            q = q + (((a - q * bb) != 0) & ((a < 0) != (bb < 0))).astype(dt)
        r = a - q * bb
        out = q if name == "div" else r
        return np.where(bz, dt(-1) if signed else ~dt(0), out)

    return fn


def popc(a):
    return np.bitwise_count(a).astype(u32)


def clz(a, bits):
    a = np.asarray(a).astype(u64)
    n = np.full(a.shape, bits, u32)
    x = a.copy()
    pos = np.zeros(a.shape, u32)
    for s in (32, 16, 8, 4, 2, 1):
        big = x >= (u64(1) << u64(s))
        pos = pos + np.where(big, s, 0).astype(u32)
        x = np.where(big, x >> u64(s), x)
    return np.where(a == 0, n, u32(bits - 1) - pos)


def brev(a, bits):
    r = np.zeros_like(a)
    dt = a.dtype.type
    for i in range(bits):
        r |= ((a >> dt(i)) & dt(1)) << dt(bits - 1 - i)
    return r


def bfe(a, p, n, t):
    bits, ut = NP[t]().itemsize * 8, NP["u" + t[1:]]
    p, n = (np.asarray(p) & 0xFF).astype(i64), (np.asarray(n) & 0xFF).astype(i64)
    au = np.asarray(a).view(ut).astype(u64)
    ln = np.minimum(n, np.maximum(bits - p, 0))
    mask = np.where(ln >= 64, ~u64(0), (u64(1) << np.minimum(ln, 63).astype(u64)) - u64(1))
    v = np.where(p >= bits, u64(0), au >> np.minimum(p, 63).astype(u64)) & mask
    if t[0] == "s":
        sb = np.minimum(p + n - 1, bits - 1)
        sign = np.where(n == 0, u64(0), (au >> sb.astype(u64)) & u64(1))
        v = np.where(sign == 1, v | ~mask, v)
    return v.astype(ut).view(NP[t])


def bfi(a, b, p, n, t):
    dt, bits = NP[t], NP[t]().itemsize * 8
    p, n = (np.asarray(p) & 0xFF).astype(u64), (np.asarray(n) & 0xFF).astype(u64)
    n = np.minimum(n, u64(bits))
    mask = np.where(n >= 64, ~u64(0), (u64(1) << np.minimum(n, u64(63))) - u64(1))
    mask = np.where(p >= bits, u64(0), mask << np.minimum(p, u64(63))).astype(dt)
    sh = np.where(p >= bits, dt(0), np.asarray(a).astype(dt) << np.minimum(p, u64(bits - 1)).astype(dt))
    return (sh & mask) | (b & ~mask)


def prmt(a, b, c):
    a, b, c = np.broadcast_arrays(np.asarray(a), np.asarray(b), np.asarray(c))
    src = a.astype(u64) | (b.astype(u64) << u64(32))
    out = np.zeros(a.shape, u32)
    for i in range(4):
        sel = (c >> u32(4 * i)) & u32(15)
        byte = ((src >> ((sel & u32(7)).astype(u64) * u64(8))) & u64(0xFF)).astype(u32)
        byte = np.where(sel & u32(8), np.where(byte & u32(0x80), u32(0xFF), u32(0)), byte)
        out |= byte << u32(8 * i)
    return out


def lop3(a, b, c, lut):
    r = np.zeros(np.broadcast(a, b, c).shape, u32)
    for k in range(8):
        if lut >> k & 1:
            r |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return r


def shf(a, b, c, left, clamp):
    n = (np.minimum(c, u32(32)) if clamp else (c & u32(31))).astype(u64)
    w = (np.asarray(b).astype(u64) << u64(32)) | np.asarray(a).astype(u64)
    return ((w << n) >> u64(32)).astype(u32) if left else (w >> n).astype(u32)


CMP_I = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def compare(op, t):
    if t not in FLOATS:
        return CMP_I[op]
    up = bf16_up if t == "bf16" else (lambda x: x)

    def fn(a, b):
        a, b = up(a), up(b)
        nan = np.isnan(a) | np.isnan(b)
        if op == "num":
            return ~nan
        if op == "nan":
            return nan
        unordered = len(op) == 3 and op.endswith("u")
        r = CMP_I[op[:2]](a, b)
        return (r | nan) if unordered else (r & ~nan)

    return fn


# ---- conversions ----------------------------------------------------------------------------------
def cvt(m):
    types = [x for x in m if x in NP]
    dt, st = types[0], types[-1]
    rnd = next((x for x in m if x in RND), None)
    irnd = next((x for x in m if x in ("rni", "rzi", "rmi", "rpi")), None)
    sat, ftz, relu = "sat" in m, "ftz" in m, "relu" in m
    # Two numbers to one register; a floating-point number from one, from an integer, to an integer; and two
    # integers.
    if dt in ("f16x2", "bf16x2"):
        half = dt[:-2]

        def pack(a, b):
            hi, lo = (narrow(widen(x, st), half, rnd or "rn", sat, relu) for x in (a, b))
            return (np.asarray(hi).view(np.uint16).astype(u32) << u32(16)) | np.asarray(lo).view(
                np.uint16
            ).astype(u32)

        return pack, [st, st], dt
    if dt in FLOATS and st in FLOATS:

        def ff(a):
            if ftz and st == "f32":
                a = flush(a)
            x = widen(a, st)
            if irnd:
                x = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[irnd](x)
            r = narrow(x, dt, rnd or "rn", sat, relu)
            return flush(r) if ftz and dt == "f32" else r

        return ff, [st], dt
    if dt in FLOATS:

        def fi(a):
            if dt == "f64" or NP[st]().itemsize < 8:
                return narrow(np.asarray(a).astype(f64), dt, rnd or "rn", sat)
            hi = np.asarray(a).astype(f64)  # 64-bit integers: exact residue, then round to odd
            lim = f64(2.0**63) if st[0] == "s" else f64(2.0**64)
            back = np.where(hi >= lim, 0.0, hi).astype(NP[st]).view(i64)
            back = np.where(hi >= lim, i64(-(2**63)) if st[0] == "s" else i64(0), back)
            resid = (np.asarray(a).view(i64) - back).astype(f64)  # wraps to the exact small residue
            return narrow(odd_sum(hi, resid), dt, rnd or "rn", sat)

        return fi, [st], dt
    if st in FLOATS:
        info = np.iinfo(NP[dt])

        def if_(a):
            x = widen(flush(a) if ftz and st == "f32" else a, st)
            x = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[irnd or "rzi"](x)
            nan, hi, lo = np.isnan(x), x >= float(info.max), x <= float(info.min)
            v = np.where(nan | hi | lo, 0.0, x).astype(NP[dt])
            v = np.where(hi, info.max, np.where(lo, info.min, v)).astype(NP[dt])
            nanval = info.min if (info.bits == 64 and info.min < 0) else (1 << 63 if info.bits == 64 else 0)
            return np.where(nan, np.array(nanval).astype(NP[dt]), v)

        return if_, [st], dt

    def ii(a):
        if sat:
            info = np.iinfo(NP[dt])
            lo = max(info.min, np.iinfo(NP[st]).min)
            a = np.clip(a, np.array(lo, NP[st]), np.array(min(info.max, np.iinfo(NP[st]).max), NP[st]))
        return np.asarray(a).astype(NP[dt])

    return ii, [st], dt


# ---- instruction -> function ----------------------------------------------------------------------
def halves(fn, half):
    """Apply a 16-bit float op to both halves of packed 32-bit operands."""

    def g(*xs):
        out = []
        for sh in (0, 16):
            hs = [((x >> u32(sh)) & u32(0xFFFF)).astype(np.uint16) for x in xs]
            if half == "f16":
                hs = [h.view(np.float16) for h in hs]
            out.append(np.asarray(fn(*hs)).view(np.uint16).astype(u32))
        return out[0] | (out[1] << u32(16))

    return g


def build(ins):
    op, m = ins.op, ins.mods
    t = next((x for x in reversed(m) if x in NP), None)
    if op == "cvt":
        return cvt(m)
    # Moves, comparisons and choices.
    if op in ("mov", "cvta"):
        return (lambda a: np.array(a)), [t], t
    if op == "setp":
        c = compare(m[0], t)
        comb = next((x for x in m[1:] if x in ("and", "or", "xor")), None)
        if comb is None:
            return c, [t, t], "pred"
        g = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[comb]
        return (lambda a, b, p: g(c(a, b), p)), [t, t, "pred"], "pred"
    if op == "set":
        types = [x for x in m if x in NP]
        c = compare(m[0], types[1])
        one = f32(1) if types[0] == "f32" else NP[types[0]](~NP[types[0]](0) if types[0][0] == "u" else -1)
        return (lambda a, b: np.where(c(a, b), one, NP[types[0]](0))), [types[1]] * 2, types[0]
    if op == "selp":
        return (lambda a, b, p: np.where(p, a, b)), [t, t, "pred"], t
    if op == "slct":
        types = [x for x in m if x in NP]
        return (lambda a, b, c: np.where(c >= 0, a, b)), [types[0], types[0], types[1]], types[0]
    # Floating-point numbers.
    if t in ("f16x2", "bf16x2"):
        half = t[:-2]
        return halves(float_op(op, half, m), half), [t] * len(ins.args[1:]), t
    if t in FLOATS and op != "testp":
        return float_op(op, t, m), [t] * len(ins.args[1:]), t
    if op == "testp":
        q = m[0]
        return (
            {
                "finite": np.isfinite,
                "infinite": np.isinf,
                "number": lambda a: ~np.isnan(a),
                "notanumber": np.isnan,
                "normal": lambda a: np.isfinite(a) & (np.abs(a) >= np.finfo(a.dtype).tiny),
                "subnormal": lambda a: (a != 0) & (np.abs(a) < np.finfo(a.dtype).tiny),
            }[q],
            [t],
            "pred",
        )
    # Predicates.
    if t == "pred":
        return (
            {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}[op],
            ["pred"] * len(ins.args[1:]),
            "pred",
        )
    # Products, quotients and shifts of integers.
    d = NP[t]
    if op == "mul" and "wide" in m:
        w = NP[WIDE[t]]
        return (lambda a, b: np.asarray(a).astype(w) * np.asarray(b).astype(w)), [t, t], WIDE[t]
    if op == "mad" and "wide" in m:
        w = NP[WIDE[t]]
        return (
            (lambda a, b, c: np.asarray(a).astype(w) * np.asarray(b).astype(w) + c),
            [t, t, WIDE[t]],
            WIDE[t],
        )
    if op in ("mul", "mad") and "hi" in m:
        return (
            ((lambda a, b: mulhi(a, b, t)), [t, t], t)
            if op == "mul"
            else ((lambda a, b, c: mulhi(a, b, t) + c), [t] * 3, t)
        )
    if op == "mad":
        return (lambda a, b, c: a * b + c), [t] * 3, t
    if op in ("mul24", "mad24"):
        s24 = (lambda a: (a << 8) >> 8) if t == "s32" else (lambda a: a & u32(0xFFFFFF))
        return (
            ((lambda a, b: s24(a) * s24(b)) if op == "mul24" else (lambda a, b, c: s24(a) * s24(b) + c)),
            [t] * len(ins.args[1:]),
            t,
        )
    if op in ("div", "rem"):
        return divrem(op, d), [t, t], t
    if op in ("shl", "shr"):
        return shift(op, t), [t, "u32"], t
    # What NumPy has by itself.
    two = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    if op in two and not ({"sat", "cc"} & set(m)):
        return two[op], [t, t], t
    if op in ("add", "sub") and "sat" in m:
        lo, hi = np.iinfo(d).min, np.iinfo(d).max
        s = 1 if op == "add" else -1
        return (
            (lambda a, b: np.clip(a.astype(i64) + s * np.asarray(b).astype(i64), lo, hi).astype(d)),
            [t, t],
            t,
        )
    one = {"not": np.invert, "neg": np.negative, "abs": np.abs}
    if op in one:
        return one[op], [t], t
    # Bits.
    bits = d().itemsize * 8
    if op == "cnot":
        return (lambda a: (a == 0).astype(d)), [t], t
    if op == "popc":
        return popc, [t], "u32"
    if op == "clz":
        return (lambda a: clz(a, bits)), [t], "u32"
    if op == "bfind":
        neg = (lambda a: np.where(a < 0, ~a, a)) if t[0] == "s" else (lambda a: a)
        sh = "shiftamt" in m

        def bfind(a):
            c = clz(np.asarray(neg(a)).view(NP["u" + t[1:]]), bits)
            r = c if sh else u32(bits - 1) - c
            return np.where(c == bits, u32(0xFFFFFFFF), r)

        return bfind, [t], "u32"
    if op == "brev":
        return (lambda a: brev(np.asarray(a), bits)), [t], t
    if op == "bfe":
        return (lambda a, p, n: bfe(a, p, n, t)), [t, "u32", "u32"], t
    if op == "bfi":
        return (lambda a, b, p, n: bfi(a, b, p, n, t)), [t, t, "u32", "u32"], t
    if op == "prmt":
        if len(m) > 1:
            raise NotImplementedError("prmt modes")
        return prmt, ["b32"] * 3, "b32"
    if op == "lop3":
        lut = ins.args[-1].value
        return (lambda a, b, c, _: lop3(a, b, c, lut)), ["b32"] * 4, "b32"
    if op == "shf":
        return (lambda a, b, c: shf(a, b, c, m[0] == "l", "clamp" in m)), ["b32", "b32", "u32"], "b32"
    if op == "sad":
        return (lambda a, b, c: c + np.where(a < b, b - a, a - b)), [t] * 3, t
    raise NotImplementedError(ins.text)
