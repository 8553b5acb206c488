"""Turn parsed instructions into Python closures step(machine, active) -> None | True.

`active` is slice(None) (all threads) or an index array.  A step that returns True has itself set the
program counters (branches, barriers, exits, warp-synchronous instructions).
"""

import numpy as np

from . import alu
from .alu import NP, u32, u64
from .machine import AT_BAR, FULL, RAW, SPACES, Fault
from .memory import BASE, LOCAL_WINDOW, SHARED_WINDOW
from .parse import SIZES, Imm, Not, PtxError, Reg, Special, Sym, Vec


def width(t):
    return SIZES[t]


class Compiler:
    def __init__(self, launch):
        self.L = launch

    # -- operands -------------------------------------------------------------------------------
    def reader(self, o, t):
        """-> f(machine, act) giving an array (or NumPy scalar) of PTX type t."""
        dt = NP[t]
        # A register, or the opposite of a predicate.
        if isinstance(o, Reg):
            i, w, rw = self.L.reg_base[o], width(t), width(o.type)
            if t == "pred":

                def rd(m, a):
                    r = m.regs[i]
                    if r is None:
                        r = self.undefined(m, o, i)
                    return r if a is FULL else r[a]

                return rd
            cast = rw != w
            rdt = RAW[w]

            def rd(m, a):
                r = m.regs[i]
                if r is None:
                    r = self.undefined(m, o, i)
                if a is not FULL:
                    r = r[a]
                return (r.astype(rdt) if cast else r).view(dt)

            return rd
        if isinstance(o, Not):
            f = self.reader(o.reg, "pred")
            return lambda m, a: ~f(m, a)
        # A constant.
        if isinstance(o, Imm):
            if o.fbits == 32 and t in ("f32", "b32", "u32", "s32"):
                v = np.array(o.value, np.uint32).view(dt)[()]
            elif o.fbits == 64:
                v = np.array(o.value, np.uint64).view(np.float64)[()]
                v = dt(v) if t in alu.FLOATS else np.array(o.value, np.uint64).view(dt)[()]
            elif t == "pred":
                v = np.bool_(o.value != 0)
            elif t == "f16":
                v = np.array(o.value & 0xFFFF, np.uint16).view(np.float16)[()]
            elif t in alu.FLOATS and t != "bf16":
                v = dt(o.value)
            else:
                bits = 8 * width(t)
                v = np.array(o.value & ((1 << bits) - 1), RAW[width(t)]).view(dt)[()]
            return lambda m, a: v
        # A special register, the address of a symbol, or the size of a warp.
        if isinstance(o, Special):
            name = o.name
            if name.startswith("%lanemask_"):
                kind = name[10:]

                def lm(m, a):
                    lane = m.lane[a].astype(u64)
                    one = u64(1) << lane
                    v = {
                        "eq": one,
                        "lt": one - u64(1),
                        "le": (one << u64(1)) - u64(1),
                        "gt": ~((one << u64(1)) - u64(1)),
                        "ge": ~(one - u64(1)),
                    }[kind]
                    return v.astype(u32).view(dt)

                return lm

            def sp(m, a):
                if name in m.special:
                    v = m.special[name][a]
                    return v.astype(RAW[width(t)]).view(dt) if width(t) != 4 else v.view(dt)
                if name in m.uniform:
                    return np.array(m.uniform[name]).astype(dt)[()]
                raise Fault(f"special register {name}")

            return sp
        if isinstance(o, Sym):
            v = dt(32) if o.name == "WARP_SZ" else np.array(self.symbol(o.name)[1], np.uint64).astype(dt)[()]
            return lambda m, a: v
        raise PtxError(f"operand {o!r}")

    def undefined(self, m, reg, i):
        m.regs[i] = np.zeros(m.n, np.bool_ if reg.type == "pred" else RAW[width(reg.type)])
        return m.regs[i]

    def writer(self, o, t):
        if o is None:
            return lambda m, a, v: None
        i, w, rw = self.L.reg_base[o], width(t), width(o.type)
        rdt = np.bool_ if o.type == "pred" else RAW[rw]
        signed = t[0] == "s"
        ext = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[rw] if rw > w and signed else None

        def wr(m, a, v):
            v = np.asarray(v)
            if rdt is not np.bool_:
                if ext is not None:
                    v = v.astype(ext)
                v = v.view(rdt) if v.dtype.itemsize == rw else v.view(RAW[v.dtype.itemsize]).astype(rdt)
            if a is FULL:
                m.regs[i] = v if v.shape == (m.n,) else np.full(m.n, v, rdt)
            else:
                r = m.regs[i]
                if r is None:
                    r = m.regs[i] = np.zeros(m.n, rdt)
                r[a] = v

        return wr

    def symbol(self, name):
        """(space, address) of a variable."""
        f = self.ins.fn
        v = f.vars.get(name) or self.L.module.globals.get(name)
        if v is None:
            raise PtxError(f"unknown symbol {name}")
        return v.space, self.L.var_addr[v]

    def address(self, o, space):
        """-> (space, f(machine, act) -> u64 addresses)."""
        off = u64(o.offset & (2**64 - 1))
        if isinstance(o.base, Sym):
            sp, base = self.symbol(o.base.name)
            v = u64((base + o.offset) & (2**64 - 1))
            return sp if space in (None, "param") else space, lambda m, a: v
        if isinstance(o.base, Imm):
            v = u64((o.base.value + o.offset) & (2**64 - 1))
            return space, lambda m, a: v
        t = "u64" if width(o.base.type) == 8 else "u32"
        f = self.reader(o.base, t)
        if t == "u64":
            return space, (lambda m, a: f(m, a) + off) if o.offset else f
        s = np.int64(o.offset)
        return space, lambda m, a: (f(m, a).astype(np.int64) + s).astype(u64)

    # -- instructions ---------------------------------------------------------------------------
    def compile(self, ins, pc):
        self.ins, self.pc = ins, pc
        body = self.body(ins, pc)
        if ins.pred is None or ins.op == "bra":
            return body
        p = self.reader(ins.pred, "pred")
        neg = ins.neg

        def predicated(m, a):
            c = p(m, a)
            if neg:
                c = ~c
            if c.all():
                return body(m, a)
            if not c.any():
                return None
            idx = np.flatnonzero(c) if a is FULL else a[c]
            rest = np.flatnonzero(~c) if a is FULL else a[~c]
            r = body(m, idx)
            if r is not None:
                m.goto(rest, pc + 1)
            return r

        return predicated

    def body(self, ins, pc):
        op, m_, L = ins.op, ins.mods, self.L
        # The flow of control.
        if op == "bra":
            return self.branch(ins, pc)
        if op == "brx":
            targets = np.array(
                [ins.fn.labels[t] + L.fn_pc[ins.fn] for t in ins.fn.tables[ins.args[1].name]], np.int32
            )
            rd = self.reader(ins.args[0], "u32")

            def brx(m, a):
                k = np.broadcast_to(rd(m, a), np.arange(m.n)[a].shape)
                if (k >= len(targets)).any():
                    m.report("brx.idx index out of range", ins, a, k >= len(targets))
                m.goto(a, targets[np.minimum(k, len(targets) - 1)])
                return True

            return brx
        if op in ("ret", "exit"):
            if op == "exit" or ins.fn.entry:

                def ex(m, a):
                    m.finish(a)
                    return True

                return ex
            name = ins.fn.name

            def ret(m, a):
                m.goto(a, m.ret[name][a])
                return True

            return ret
        if op == "call":
            return self.call(ins, pc)
        if op == "callret":
            return self.callret(ins)
        if op in ("trap", "brkpt"):

            def trap(m, a):
                m.report("trap executed", ins, a)
                m.finish(a)
                return True

            return trap
        # Barriers, and what has no effect here.
        if op in ("bar", "barrier"):
            if m_[0] == "warp":
                return self.warp_sync(ins, pc, self.reader(ins.args[0], "b32"), lambda m, a, k: None)
            return self.barrier(ins, pc)
        if op in (
            "membar",
            "fence",
            "prefetch",
            "prefetchu",
            "nanosleep",
            "pmevent",
            "discard",
            "applypriority",
            "griddepcontrol",
        ):
            return lambda m, a: None
        # Memory, and what the threads of a warp do together.
        if op in ("ld", "ldu"):
            return self.load(ins)
        if op == "st":
            return self.store(ins)
        if op in ("atom", "red"):
            return self.atomic(ins)
        if op in ("shfl", "vote", "match", "redux", "activemask"):
            return self.warp_op(ins, pc)
        # Registers that are vectors or addresses, and sums with a carry.
        if op == "mov" and (isinstance(ins.args[0], Vec) or isinstance(ins.args[1], Vec)):
            return self.mov_vec(ins)
        if op == "cvta":
            return self.cvta(ins)
        if op == "isspacep":
            rd, wr = self.reader(ins.args[1], "u64"), self.writer(ins.args[0], "pred")
            win = {"shared": SHARED_WINDOW >> 56, "local": LOCAL_WINDOW >> 56}.get(m_[0].split("::")[0], 0)
            return lambda m, a: wr(m, a, (rd(m, a) >> u64(56)) == u64(win))
        if op in ("add", "sub", "mad", "addc", "subc", "madc") and ("cc" in m_ or op.endswith("c")):
            return self.carry(ins)
        # All other instructions read registers and write one, or a predicate and its opposite.
        fn, st, dt = alu.build(ins)
        dst = ins.args[0]
        second = None
        if isinstance(dst, tuple):
            dst, second = dst
        srcs = [self.reader(o, t) for o, t in zip(ins.args[1:], st, strict=False)]
        wr = self.writer(dst, dt)
        if op == "mov":
            rd = srcs[0]
            return lambda m, a: wr(m, a, np.array(rd(m, a)))
        if second is not None:  # setp p|q
            wr2 = self.writer(second, "pred")

            def two(m, a):
                v = fn(*[s(m, a) for s in srcs])
                wr(m, a, v)
                wr2(m, a, ~np.asarray(v))

            return two
        if len(srcs) == 1:
            (s0,) = srcs
            return lambda m, a: wr(m, a, fn(s0(m, a)))
        if len(srcs) == 2:
            s0, s1 = srcs
            return lambda m, a: wr(m, a, fn(s0(m, a), s1(m, a)))
        return lambda m, a: wr(m, a, fn(*[s(m, a) for s in srcs]))

    def carry(self, ins):
        """add.cc / addc / sub.cc / subc / mad.cc / madc on 32- and 64-bit integers."""
        t = ins.mods[-1]
        bits, dt = 8 * width(t), RAW[width(t)]
        srcs = [self.reader(o, "u" + t[1:]) for o in ins.args[1:]]
        wr = self.writer(ins.args[0], "u" + t[1:])
        use, out = ins.op.endswith("c"), "cc" in ins.mods
        base = ins.op.rstrip("c") if ins.op != "subc" else "sub"
        base = {"add": "add", "sub": "sub", "mad": "mad"}[base]
        hi = "hi" in ins.mods
        if base == "mad" and bits == 64:
            raise NotImplementedError(ins.text)

        def step(m, a):
            x = [np.broadcast_to(np.asarray(s(m, a)), np.arange(m.n)[a].shape) for s in srcs]
            if "cc" not in m.__dict__:
                m.cc = np.zeros(m.n, np.uint64)
            c = m.cc[a] if use else np.zeros(len(x[0]), np.uint64)
            if base == "mad":
                p = x[0].astype(u64) * x[1].astype(u64)
                x = [((p >> u64(32)) if hi else p).astype(dt), x[2]]
            if base != "sub":
                r = x[0] + x[1]
                k = r < x[0]
                r2 = r + c.astype(dt)
                k = k | (r2 < r)
            else:
                r = x[0] - x[1]
                k = x[0] < x[1]
                r2 = r - c.astype(dt)
                k = k | (r < c.astype(dt))
            if out:
                m.cc[a] = k
            wr(m, a, r2)

        return step

    # -- control --------------------------------------------------------------------------------
    def branch(self, ins, pc):
        target = ins.fn.labels[ins.args[0].name] + self.L.fn_pc[ins.fn]
        if ins.pred is None:

            def jump(m, a):
                m.goto(a, target)
                return True

            return jump
        p, neg = self.reader(ins.pred, "pred"), ins.neg
        stats = self.L.branch_stats.setdefault(pc, [0, 0])

        def br(m, a):
            c = p(m, a)
            if neg:
                c = ~c
            k = np.count_nonzero(c)
            if k == len(c):
                m.goto(a, target)
            elif k == 0:
                m.goto(a, pc + 1)
            else:
                new = np.where(c, np.int32(target), np.int32(pc + 1))
                m.pc[a] = new
                m.key[a] = new
                w = m.warp[a]
                took = np.bincount(w, weights=c, minlength=1)
                all_ = np.bincount(w, minlength=1)
                stats[1] += int(((took > 0) & (took < all_)).sum())
            stats[0] += 1
            return True

        return br

    def barrier(self, ins, pc):
        kinds = [x for x in ins.mods if x in ("sync", "arrive", "red")]
        if kinds and kinds[0] == "arrive":
            raise NotImplementedError(ins.text)
        args = list(ins.args)
        L = self.L
        if "red" in kinds:
            # bar.red.{popc.u32|and.pred|or.pred} d, bar {, count}, {!}p : value computed on release
            dst, p = args[0], args[-1]
            rd = self.reader(p, "pred")
            rop = ins.mods[ins.mods.index("red") + 1]
            L.bar_red[pc] = (rop, self.writer(dst, "u32" if rop == "popc" else "pred"), rd)
            args = args[1:-1]
        rid = self.reader(args[0], "u32")
        rcnt = self.reader(args[1], "u32") if len(args) > 1 else None

        def bar(m, a):
            m.barid[a] = rid(m, a)
            m.barcnt[a] = 0 if rcnt is None else rcnt(m, a)
            m.park(a, AT_BAR, pc)
            return True

        return bar

    def call(self, ins, pc):
        args = list(ins.args)
        if isinstance(args[0], Vec):  # where the results go, which callret reads
            args.pop(0)
        name = args.pop(0).name
        actual = args.pop(0) if args and isinstance(args[0], Vec) else Vec()
        fn = self.L.module.functions.get(name)
        if fn is None or not fn.code:
            if name in ("__assertfail", "__trap"):

                def fail(m, a):
                    m.report("device assert failed", ins, a)
                    m.finish(a)
                    return True

                return fail
            if name == "vprintf":

                def pf(m, a):
                    m.report("device printf called (not shown)", ins, a)
                    m.goto(a, pc + 2)
                    return True

                return pf
            raise NotImplementedError(f"call to external function {name}")
        moves = [
            (self.symbol(x.name)[1], self.L.var_addr[p], p.size)
            for x, p in zip(actual, fn.params, strict=False)
        ]
        entry = self.L.fn_pc[fn]

        def call(m, a):
            loc = m.local.reshape(m.n, m.Lsz)
            for src, dst, size in moves:
                loc[a, dst : dst + size] = loc[a, src : src + size]
            if name not in m.ret:
                m.ret[name] = np.zeros(m.n, np.int32)
            m.ret[name][a] = pc + 1
            m.goto(a, entry)
            return True

        return call

    def callret(self, ins):
        args = list(ins.args)
        rets = args.pop(0) if isinstance(args[0], Vec) else Vec()
        fn = self.L.module.functions.get(args[0].name)
        if fn is None or not fn.code:
            return lambda m, a: None
        moves = [
            (self.L.var_addr[p], self.symbol(x.name)[1], p.size) for x, p in zip(rets, fn.rets, strict=False)
        ]

        def back(m, a):
            loc = m.local.reshape(m.n, m.Lsz)
            for src, dst, size in moves:
                loc[a, dst : dst + size] = loc[a, src : src + size]

        return back

    # -- moves ------------------------------------------------------------------------------------
    def mov_vec(self, ins):
        t = ins.mods[-1]
        d, s = ins.args
        if isinstance(s, Vec):  # pack
            w = width(t) // len(s)
            parts = [self.reader(x, f"b{8 * w}") for x in s]
            dt = RAW[width(t)]
            wr = self.writer(d, f"b{8 * width(t)}")

            def pack(m, a):
                v = dt(0)
                for k, p in enumerate(parts):
                    v = v | (np.asarray(p(m, a)).astype(dt) << dt(8 * w * k))
                wr(m, a, v)

            return pack
        w = width(t) // len(d)
        src, dt = self.reader(s, f"b{8 * width(t)}"), RAW[w]
        wrs = [self.writer(x, f"b{8 * w}") for x in d]

        def unpack(m, a):
            v = np.asarray(src(m, a))
            vt = v.dtype.type
            for k, wr in enumerate(wrs):
                wr(m, a, (v >> vt(8 * w * k)).astype(dt))

        return unpack

    def cvta(self, ins):
        to = "to" in ins.mods
        space = next(x.split("::")[0] for x in ins.mods if x.split("::")[0] in SPACES)
        src = ins.args[1]
        rd, wr = self.reader(src, "u64"), self.writer(ins.args[0], "u64")
        win = u64({"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space, 0))
        return (
            (lambda m, a: wr(m, a, np.array(rd(m, a) - win)))
            if to
            else (lambda m, a: wr(m, a, np.array(rd(m, a) + win)))
        )

    # -- memory -------------------------------------------------------------------------------------
    def mem_mods(self, ins):
        t = ins.mods[-1]
        vec = next((int(x[1]) for x in ins.mods if x in ("v2", "v4", "v8")), 1)
        space = next((x.split("::")[0] for x in ins.mods if x.split("::")[0] in SPACES), None)
        if t == "b128":
            raise NotImplementedError(ins.text)
        return t, vec, space

    def load(self, ins):
        t, vec, space = self.mem_mods(ins)
        w = width(t)
        d, ad = ins.args[0], ins.args[1]
        wrs = [self.writer(x, t) for x in (d if isinstance(d, Vec) else [d])]
        space, addr = self.address(ad, space)
        if space in ("param", "const") and self.L.is_local_param(ins, ad):
            space = "local"
        nc = "nc" in ins.mods
        dt = NP[t]
        L = self.L

        def ld(m, a):
            ad_ = addr(m, a)
            if ad_.ndim == 0:
                if space in ("param", "const"):  # same for all threads
                    o = int(ad_) - BASE
                    raw = m.mem.data[o : o + w * vec].view(dt)
                    for k, wr in enumerate(wrs):
                        wr(m, a, raw[k])
                    return
                ad_ = np.full(m.n if a is FULL else len(a), ad_, u64)
            vals = L.read(m, a, ad_, w, vec, space, ins, nc)
            for k, wr in enumerate(wrs):
                wr(m, a, vals[:, k].view(dt) if vec > 1 else vals[:, 0].view(dt))

        return ld

    def store(self, ins):
        t, vec, space = self.mem_mods(ins)
        w = width(t)
        ad, s = ins.args[0], ins.args[1]
        rds = [self.reader(x, f"b{8 * w}") for x in (s if isinstance(s, Vec) else [s])]
        space, addr = self.address(ad, space)
        if space == "param":
            space = "local"
        L = self.L

        def st(m, a):
            ad_ = addr(m, a)
            n = m.n if a is FULL else len(a)
            if ad_.ndim == 0:
                ad_ = np.full(n, ad_, u64)
            vals = np.empty((n, vec), RAW[w])
            for k, rd in enumerate(rds):
                vals[:, k] = rd(m, a)
            L.write(m, a, ad_, w, vec, space, ins, vals)

        return st

    def atomic(self, ins):
        ops = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
        op = next(x for x in ins.mods if x in ops)
        t = ins.mods[-1]
        space = next((x.split("::")[0] for x in ins.mods if x.split("::")[0] in SPACES), None)
        vec = next((int(x[1]) for x in ins.mods if x in ("v2", "v4", "v8")), 1)
        if vec > 1:
            raise NotImplementedError(ins.text)
        args = list(ins.args)
        dst = args.pop(0) if ins.op == "atom" else None
        space, addr = self.address(args[0], space)
        rds = [self.reader(x, t) for x in args[1:]]
        wr = self.writer(dst, t) if dst is not None else None
        if dst is not None and self.L.reads.get(dst, 0) == 0:
            wr = None  # result unused: a reduction
        w, L = width(t), self.L
        half = {"f16": "f16", "bf16": "bf16", "f16x2": "f16", "bf16x2": "bf16"}.get(t)

        def combine(old, b, c):
            if op == "exch":
                return b
            if op == "cas":
                return np.where(old == b, c, old)
            if op == "inc":
                return np.where(old >= b, old.dtype.type(0), old + old.dtype.type(1))
            if op == "dec":
                return np.where((old == 0) | (old > b), b, old - old.dtype.type(1))
            if half:
                f = alu.float_op(op, half, ["rn"])
                return alu.halves(f, half)(old, b) if t.endswith("x2") else f(old, b)
            return {
                "add": np.add,
                "min": np.minimum,
                "max": np.maximum,
                "and": np.bitwise_and,
                "or": np.bitwise_or,
                "xor": np.bitwise_xor,
            }[op](old, b)

        def at(m, a):
            n = m.n if a is FULL else len(a)
            ad_ = addr(m, a)
            if ad_.ndim == 0:
                ad_ = np.full(n, ad_, u64)
            xs = [np.broadcast_to(np.asarray(r(m, a)), (n,)) for r in rds] + [None]
            L.atomic(m, a, ad_, w, space, ins, NP[t], combine, xs, op, wr)

        return at

    # -- warp-level -----------------------------------------------------------------------------------
    def warp_sync(self, ins, pc, mask, act_fn):
        def go(m, a):
            k = mask(m, a)
            idx, mk = m.warp_ready(a, k, ins, pc)
            if len(idx):
                act_fn(m, idx, mk)
                m.wake(idx, pc + 1)
            return True

        return go

    def warp_op(self, ins, pc):
        op, mods = ins.op, ins.mods
        # Which threads are here.
        if op == "activemask":
            wr = self.writer(ins.args[0], "b32")
            return lambda m, a: wr(m, a, m.by_warp(np.ones(m.n, bool)[a], a)[m.warp[a]])
        # A value of another lane.
        if op == "shfl":
            mode = next(x for x in mods if x in ("up", "down", "bfly", "idx"))
            d = ins.args[0]
            d, p = d if isinstance(d, tuple) else (d, None)
            wr, wp = self.writer(d, "b32"), self.writer(p, "pred")
            ra, rb, rc = (self.reader(x, "b32") for x in ins.args[1:4])

            def shfl(m, idx, mk):
                n = len(idx)

                def full(v):
                    return np.broadcast_to(np.asarray(v), (n,)).astype(np.int64)

                val = np.broadcast_to(np.asarray(ra(m, idx)), (n,))
                b, c = full(rb(m, idx)) & 31, full(rc(m, idx))
                lane = m.lane[idx].astype(np.int64)
                seg, cv = (c >> 8) & 31, c & 31
                maxl, minl = (lane & seg) | (cv & ~seg & 31), lane & seg
                j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": minl | (b & ~seg & 31)}[mode]
                ok = (j >= maxl) if mode == "up" else (j <= maxl)
                j = np.where(ok, j, lane)
                base = idx - lane  # position of lane 0 of this warp
                src = base + j
                inb = (m.lin[idx] - lane + j) < m.bs
                src = np.where(inb, src, idx)
                tmp, here = np.zeros(m.n, np.uint32), np.zeros(m.n, bool)
                tmp[idx] = val
                here[idx] = True
                bad = ~(inb & here[src] & (((mk >> j.astype(u32)) & u32(1)) == 1))
                if bad.any():
                    m.report("shfl reads a lane that does not take part", ins, idx, bad)
                wr(m, idx, tmp[src])
                wp(m, idx, ok)

            return self.warp_sync(ins, pc, self.reader(ins.args[4], "b32"), shfl)
        # A predicate of all lanes.
        if op == "vote":
            kind = next(x for x in mods if x in ("all", "any", "uni", "ballot"))
            rp = self.reader(ins.args[1], "pred")
            wr = self.writer(ins.args[0], "b32" if kind == "ballot" else "pred")

            def vote(m, idx, mk):
                p = np.broadcast_to(np.asarray(rp(m, idx)), idx.shape)
                word = m.by_warp(p, idx)[m.warp[idx]] & mk
                here = m.by_warp(np.ones(len(idx), bool), idx)[m.warp[idx]] & mk
                wr(
                    m,
                    idx,
                    {
                        "ballot": word,
                        "any": word != 0,
                        "all": word == here,
                        "uni": (word == 0) | (word == here),
                    }[kind],
                )

            return self.warp_sync(ins, pc, self.reader(ins.args[2], "b32"), vote)
        # The sum, least, largest or bits of all lanes.
        if op == "redux":
            kind, t = mods[-2] if mods[-2] != "sync" else mods[1], mods[-1]
            rd, wr = self.reader(ins.args[1], t), self.writer(ins.args[0], t)
            f = {
                "add": np.add,
                "min": np.minimum,
                "max": np.maximum,
                "and": np.bitwise_and,
                "or": np.bitwise_or,
                "xor": np.bitwise_xor,
            }[kind]

            def redux(m, idx, mk):
                v = np.broadcast_to(np.asarray(rd(m, idx)), idx.shape)
                out = np.empty_like(v)
                g = m.warp[idx].astype(u64) << u64(32) | mk.astype(u64)
                for k in np.unique(g):
                    s = g == k
                    out[s] = f.reduce(v[s])
                wr(m, idx, out)

            return self.warp_sync(ins, pc, self.reader(ins.args[2], "b32"), redux)
        # Which lanes have the same value.
        if op == "match":
            kind, t = mods[0], mods[-1]
            d = ins.args[0]
            d, p = d if isinstance(d, tuple) else (d, None)
            rd, wr, wp = self.reader(ins.args[1], t), self.writer(d, "b32"), self.writer(p, "pred")

            def match(m, idx, mk):
                v = np.broadcast_to(np.asarray(rd(m, idx)), idx.shape)
                out = np.zeros(len(idx), np.uint32)
                for k in np.unique(m.warp[idx]):
                    s = np.flatnonzero(m.warp[idx] == k)
                    bits = np.uint32(1) << m.lane[idx[s]]
                    same = v[s][:, None] == v[s][None, :]
                    out[s] = (same * bits[None, :]).sum(1).astype(np.uint32) & mk[s]
                if kind == "all":
                    allm = m.by_warp(np.ones(len(idx), bool), idx)[m.warp[idx]] & mk
                    wp(m, idx, out == allm)
                    out = np.where(out == allm, mk, u32(0))
                wr(m, idx, out)

            return self.warp_sync(ins, pc, self.reader(ins.args[2], "b32"), match)
        raise NotImplementedError(ins.text)
