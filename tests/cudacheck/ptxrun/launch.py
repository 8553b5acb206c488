"""Module loading, kernel launch, memory access with checks, and the report."""

import subprocess
import tempfile
import time

import numpy as np

from . import parse as P
from .alu import u64
from .compile import Compiler
from .machine import Fault, Machine
from .memory import (
    BASE,
    INIT,
    LOCAL_WINDOW,
    MAPPED,
    PARAMETERS,
    READONLY,
    RED,
    REP,
    SHARED_WINDOW,
    STORED,
    VARIABLES,
    VARIABLES_AT,
    VBASE,
    WRITTEN,
    Global,
    Traffic,
    U,
    count_sectors,
)

INT_OPS = {
    "add",
    "sub",
    "mul",
    "mad",
    "and",
    "or",
    "xor",
    "not",
    "shl",
    "shr",
    "lop3",
    "bfi",
    "bfe",
    "prmt",
    "shf",
    "min",
    "max",
    "selp",
    "setp",
    "mov",
    "cvt",
    "popc",
    "clz",
    "brev",
    "neg",
    "abs",
    "div",
    "rem",
    "slct",
}


class Report:
    def __init__(self, kernel):
        self.kernel, self.problems, self.traffic, self.shared = kernel, {}, Traffic(), {}
        self.instructions, self.warp_instructions, self.seconds, self.by_op = 0, 0, 0.0, {}
        self.divergent = []
        self.barriers = 0

    def add(self, kind, ins, count, who, extra=""):
        key = (kind, ins.line)
        p = self.problems.setdefault(
            key, dict(kind=kind, line=ins.line, loc=ins.loc, text=ins.text, count=0, who=who, extra=extra)
        )
        p["count"] += count

    def errors(self, *allow):
        """Problems that are not notes and do not contain one of the allowed phrases."""
        return [
            p
            for p in self.problems.values()
            if not p["kind"].startswith("note:") and not any(a in p["kind"] for a in allow)
        ]

    def __str__(self):
        out = [
            f"{self.kernel}: {self.instructions:,} thread instructions ({self.warp_instructions:,} warp), "
            f"{self.barriers} block barriers, {self.seconds:.2f} s"
        ]
        out.append(
            f"  {'buffer':<14}{'op':<4}{'warp reqs':>10}{'bytes':>14}{'32B sectors':>13}{'sector bytes':>14}"
            f"{'efficiency':>11}{'unique bytes':>14}"
        )
        for (buf, op), r in sorted(self.traffic.rows.items()):
            sb = r["sectors"] * 32
            out.append(
                f"  {buf:<14}{op:<4}{r['requests']:>10,}{r['bytes']:>14,}{r['sectors']:>13,}{sb:>14,}"
                f"{r['bytes'] / max(sb, 1):>11.0%}{r.get('unique', 0):>14,}"
            )
        for k, r in self.shared.items():
            out.append(
                f"  shared {k:<3} {r['requests']:,} warp requests, {r['cycles']:,} bank cycles "
                f"({r['cycles'] / max(1, r['requests']):.2f} per request)"
            )
        if self.divergent:
            out.append(
                "  divergent branches (warp count): "
                + ", ".join(f"line {line}: {count}" for line, count in self.divergent[:6])
            )
        for p in self.problems.values():
            loc = f" [{p['loc']}]" if p["loc"] else ""
            out.append(
                f"  !! {p['kind']}: x{p['count']}, first {p['who']}, PTX line {p['line']}{loc}: "
                f"{p['text']} {p['extra']}"
            )
        return "\n".join(out)


class Launch:
    """One kernel of one module, linked; reusable for many launches on any device, one at a time."""

    def __init__(self, module, kernel):
        self.module = module
        self.kernel = module.functions[kernel]
        fns = self.reachable(module, self.kernel)
        self.fn_pc, self.code, self.reg_base, self.var_addr = {}, [], {}, {}
        self.leaders, self.branch_stats, self.bar_red, self.reads = set(), {}, {}, {}
        base = local = shared = 0
        for f in fns:
            self.fn_pc[f] = len(self.code)
            local = (local + 15) // 16 * 16
            self.code += f.code
            for at in f.labels.values():
                self.leaders.add(self.fn_pc[f] + at)
            for r in f.regs:
                self.reg_base[r] = base + r.idx
            base += len(f.regs)
            for v in f.vars.values():
                if v.space == "local":
                    self.var_addr[v] = local + v.addr
                elif v.space == "shared":
                    shared = (shared + v.align - 1) // v.align * v.align
                    self.var_addr[v] = shared
                    shared += v.size
            local += (f.local_size + 15) // 16 * 16
            if not f.entry:
                for v in f.params + f.rets:
                    local = (local + 15) // 16 * 16
                    self.var_addr[v] = local
                    local += v.size
        self.nregs = base
        self.local_size = local
        dyn = []
        for v in module.globals.values():
            if v.space == "shared":
                if v.size == 0 or v.extern:
                    dyn.append(v)
                else:
                    shared = (shared + v.align - 1) // v.align * v.align
                    self.var_addr[v] = shared
                    shared += v.size
            else:
                self.var_addr[v] = variable_address(module, v)
        shared = (shared + 15) // 16 * 16
        for v in dyn:
            self.var_addr[v] = shared
        self.static_shared = shared
        # kernel parameters live in a hidden read-only buffer, which is the first of every memory
        off = 0
        for p in self.kernel.params:
            off = (off + p.align - 1) // p.align * p.align
            p.addr = off
            off += p.size
            self.var_addr[p] = BASE + RED + p.addr
        if off > PARAMETERS:
            raise Fault(f"{kernel} takes {off} bytes of parameters, more than {PARAMETERS}")
        self.parameter_bytes = max(off, 16)
        for ins in self.code:
            for k, o in enumerate(ins.args):
                for r in o if isinstance(o, (list, tuple)) else [o]:
                    r = r.reg if isinstance(r, P.Not) else (r.base if isinstance(r, P.Addr) else r)
                    if isinstance(r, P.Reg) and (k > 0 or ins.op in ("st", "red")):
                        self.reads[r] = self.reads.get(r, 0) + 1
        # An instruction is compiled when a thread first reaches it: much of a kernel is for other sizes.
        self.compiler = Compiler(self)
        self.exec = [None] * len(self.code) + [lambda m, a: m.finish(a) or True]
        for pc, ins in enumerate(self.code):  # a stretch ends after these
            if ins.op in (
                "bra",
                "brx",
                "bar",
                "barrier",
                "shfl",
                "vote",
                "match",
                "redux",
                "call",
                "ret",
                "exit",
            ):
                self.leaders.add(pc + 1)
        self.entry_pc = self.fn_pc[self.kernel]
        # Schedules differ in the order of warps. Where nothing goes from warp to warp, all are the same.
        self.exchanges = shared > 0 or any(
            ins.op in ("atom", "red", "membar", "fence")
            or (ins.op in ("bar", "barrier") and ins.mods[0] != "warp")
            for ins in self.code
        )

    def compiled(self, pc):
        """The step of the instruction at `pc`, compiled now."""
        step = self.exec[pc] = self.compiler.compile(self.code[pc], pc)
        return step

    @staticmethod
    def reachable(module, kernel):
        fns = [kernel]
        for f in fns:
            for ins in f.code:
                if ins.op == "call":
                    for o in ins.args:
                        g = module.functions.get(getattr(o, "name", None))
                        if g is not None and g.code and g not in fns:
                            fns.append(g)
        return fns

    def is_local_param(self, ins, ad):
        """ld.param inside a device function, or of a call result, reads the per-thread frame."""
        if isinstance(ad.base, P.Sym):
            v = ins.fn.vars.get(ad.base.name)
            return v is not None and (
                v.space == "local" or (not ins.fn.entry and v in ins.fn.params + ins.fn.rets)
            )
        return not ins.fn.entry

    # -- launching ------------------------------------------------------------------------------
    def __call__(
        self,
        device,
        grid,
        block,
        args,
        shared=0,
        schedule="min-pc",
        seed=0,
        check_races=True,
        max_threads=1 << 16,
        max_steps=10_000_000,
        blocks=None,
    ):
        def d3(t):
            return tuple(int(x) for x in (*np.atleast_1d(t), 1, 1)[:3])

        # What is asked for is checked.
        self.grid, self.block = d3(grid), d3(block)
        bs = int(np.prod(self.block))
        if bs > 1024 or bs == 0 or min(self.grid) == 0 or self.grid[0] >= 2**31 or max(self.grid[1:]) > 65535:
            raise Fault(f"invalid launch configuration grid={self.grid} block={self.block}")
        if self.kernel.maxntid and bs > int(np.prod(self.kernel.maxntid)):
            raise Fault(f"block of {bs} exceeds .maxntid {self.kernel.maxntid}")
        if len(args) != len(self.kernel.params):
            raise Fault(f"{self.kernel.name} takes {len(self.kernel.params)} arguments, got {len(args)}")
        if not (self.exchanges or shared):
            schedule = "min-pc"
        # The memory as the launch finds it: variables and parameters.
        self.dynamic_shared, self.shared_size = shared, self.static_shared + shared
        self.mem = device.mem
        for v in self.module.globals.values():
            if v in self.var_addr and v.space != "shared":
                device.variable(self.var_addr[v], v)
        o = RED
        for p, a in zip(self.kernel.params, args, strict=False):
            raw = (
                a.addr.to_bytes(8, "little")
                if hasattr(a, "addr")
                else (a if isinstance(a, bytes) else np.asarray(a).tobytes())
            )
            if len(raw) != p.size:
                raise Fault(f"parameter {p.name}: {len(raw)} bytes given, kernel wants {p.size}")
            self.mem.data[o + p.addr : o + p.addr + p.size] = np.frombuffer(raw, np.uint8)
        self.mem.state[o : o + PARAMETERS] = 0
        self.mem.state[o : o + self.parameter_bytes] = MAPPED | INIT | READONLY
        self.mem.parameters.nbytes = self.parameter_bytes
        self.mem.state &= np.uint8(~WRITTEN & 0xFF)
        # What is counted and looked for.
        self.schedule, self.rng, self.check_races, self.max_steps = (
            schedule,
            np.random.default_rng(seed),
            check_races,
            max_steps,
        )
        self.report = Report(self.kernel.name)
        self.visits, self.spent = {}, {}
        self.touched = {
            "ld": np.zeros(len(self.mem.data) // 32 + 1, bool),
            "st": np.zeros(len(self.mem.data) // 32 + 1, bool),
        }
        if check_races:
            self.mem.writer = np.full(len(self.mem.data), -1, np.int32)
        self.order = np.argsort([b.addr for b in self.mem.buffers])
        self.sorted_bufs = [self.mem.buffers[i] for i in self.order]
        self.buf_addr = np.array([b.addr for b in self.sorted_bufs], np.uint64)
        # The blocks run, as many at once as max_threads allows.
        t0 = time.time()
        every = np.arange(int(np.prod(self.grid))) if blocks is None else np.asarray(blocks)
        if schedule == "random":
            every = self.rng.permutation(every)
        per = max(1, max_threads // bs)
        with np.errstate(all="ignore"):
            for k in range(0, len(every), per):
                self.batch0 = k
                Machine(self, every[k : k + per]).run()
        # What was counted is put together.
        r = self.report
        r.seconds = time.time() - t0
        for (b, op), row in r.traffic.rows.items():
            buf = next(x for x in self.mem.buffers if x.name == b)
            s = (buf.addr - BASE) // 32
            row["unique"] = 32 * int(self.touched[op][s : s + (buf.nbytes + 31) // 32].sum())
        for (lo, hi), (threads, warps) in self.spent.items():
            r.instructions += threads * (hi - lo)
            r.warp_instructions += warps * (hi - lo)
            for ins in self.code[lo:hi]:
                r.by_op[ins.op] = r.by_op.get(ins.op, 0) + threads
        r.divergent = sorted(
            ((self.code[pc].line, c[1]) for pc, c in self.branch_stats.items() if c[1]), key=lambda t: -t[1]
        )
        for c in self.branch_stats.values():
            c[0] = c[1] = 0
        return r

    def count(self, lo, hi, act, m):
        w = m.warp[act]
        nw = 1 + int(np.count_nonzero(w[1:] != w[:-1])) if len(w) else 0
        t = self.spent.setdefault((lo, hi), [0, 0])
        t[0] += len(w)
        t[1] += nw

    def barrier_done(self, m, go, pcs):
        self.report.barriers += len(np.unique(m.blk[go]))
        for pc in np.unique(pcs):
            if int(pc) in self.bar_red:
                rop, wr, rd = self.bar_red[int(pc)]
                idx = go[pcs == pc]
                p = np.broadcast_to(rd(m, idx), idx.shape)
                s = np.bincount(m.blk[idx], weights=p, minlength=m.nb)
                n = np.bincount(m.blk[idx], minlength=m.nb)
                v = {"popc": s.astype(np.uint32), "or": s > 0, "and": s == n}[rop]
                wr(m, idx, v[m.blk[idx]])

    # -- memory access --------------------------------------------------------------------------
    def resolve(self, m, act, addr, space):
        """Split a generic access by window; returns list of (space, selector or None, address)."""
        if space == "global" or space == "const" or space == "param":
            if self.mem.virtuals:
                s = addr >= u64(VBASE)
                if s.all():
                    return [("virtual", None, addr)]
                if s.any():
                    return [("global", np.flatnonzero(~s), addr[~s]), ("virtual", np.flatnonzero(s), addr[s])]
            return [("global", None, addr)]
        if space in ("shared", "local"):
            return [(space, None, addr)]
        top = addr >> u64(56)
        out = []
        for sp, win, k in (
            ("global", 0, 0),
            ("shared", SHARED_WINDOW, SHARED_WINDOW >> 56),
            ("local", LOCAL_WINDOW, LOCAL_WINDOW >> 56),
        ):
            s = top == u64(k)
            if s.all():
                return [(sp, None, addr - u64(win))]
            if s.any():
                out.append((sp, np.flatnonzero(s), addr[s] - u64(win)))
        return out

    def read(self, m, act, addr, w, vec, space, ins, nc=False):
        parts = self.resolve(m, act, addr, space)
        if len(parts) == 1 and parts[0][1] is None:
            return self.read1(m, act, parts[0][2], w, vec, parts[0][0], ins, nc)
        out = np.zeros((len(addr), vec), U[w])
        idx = np.arange(m.n)[act]
        for sp, sel, ad in parts:
            out[sel] = self.read1(m, idx[sel], ad, w, vec, sp, ins, nc)
        return out

    def write(self, m, act, addr, w, vec, space, ins, vals):
        idx = None
        for sp, sel, ad in self.resolve(m, act, addr, space):
            if sel is None:
                self.write1(m, act, ad, w, vec, sp, ins, vals)
            else:
                idx = np.arange(m.n)[act] if idx is None else idx
                self.write1(m, idx[sel], ad, w, vec, sp, ins, vals[sel])

    def locate(self, m, act, addr, nbytes, space, ins, verb):
        """-> (byte array, its state array or None, offsets, good or None): checked offsets."""
        if space == "global":
            off = addr - u64(BASE)
            data, state = m.mem.data, m.mem.state
            size = len(data)
            inside = off < u64(size - nbytes)
            mis = (addr & u64(nbytes - 1)) != 0
            o = np.where(inside & ~mis, off, u64(0))
            # all bytes of the access mapped?  (red zones are wider than an access, ends suffice)
            good = inside & ~mis & ((state[o] & state[o + u64(nbytes - 1)] & MAPPED) != 0)

            def where(k):
                return m.mem.find(int(addr[k]))
        elif space == "shared":
            a32 = addr & u64(0xFFFFFFFF)
            inside = (
                (addr <= u64(max(self.shared_size - nbytes, 0)))
                if self.shared_size
                else np.zeros(len(addr), bool)
            )
            mis = (a32 & u64(nbytes - 1)) != 0
            good = inside & ~mis
            data, state = m.shared, m.shared_init
            o = np.where(good, a32 + (m.blk[act] * m.S).astype(u64), u64(0))

            def where(k):
                return f"shared[{int(addr[k])} of {self.shared_size}]"
        else:
            inside = addr <= u64(self.local_size - nbytes)
            mis = (addr & u64(nbytes - 1)) != 0
            good = inside & ~mis
            data, state = m.local, None
            o = np.where(good, addr + (np.arange(m.n)[act] * m.Lsz).astype(u64), u64(0))

            def where(k):
                return f"local[{int(addr[k])} of {self.local_size}]"

        if good.all():
            return data, state, o, None
        if mis.any():
            m.report(
                f"misaligned {space} {verb}",
                ins,
                act,
                mis,
                f"-> {where(int(np.flatnonzero(mis)[0]))}, needs {nbytes}-byte alignment",
            )
        oob = ~good & ~mis
        if oob.any():
            m.report(
                f"out-of-bounds {space} {verb}", ins, act, oob, f"-> {where(int(np.flatnonzero(oob)[0]))}"
            )
        return data, state, o, good

    def read1(self, m, act, addr, w, vec, space, ins, nc):
        if space == "virtual":
            return self.virtual(m, act, addr, w, vec, ins)
        nb = w * vec
        data, state, o, good = self.locate(m, act, addr, nb, space, ins, "read")
        row = (o // u64(nb)).astype(np.int64)
        vals = data[: len(data) // nb * nb].view(U[w]).reshape(-1, vec)[row]
        if good is not None:
            vals[~good] = 0
        if state is not None:
            s = state[: len(data) // nb * nb].view(U[w]).reshape(-1, vec)[row]
            if space == "global":
                bits = U[w](REP[w] * INIT)
                un = ((s & bits) != bits).any(1)
                if nc:
                    wb = U[w](REP[w] * WRITTEN)
                    wr = (s & wb).any(1)
                    wr = wr if good is None else wr & good
                    if wr.any():
                        m.report(
                            "ld.global.nc of data this kernel wrote (__restrict__ violated)", ins, act, wr
                        )
            else:
                un = (s != U[w](REP[w])).any(1)
            if good is not None:
                un &= good
            if un.any():
                m.report(
                    f"uninitialised {space} read",
                    ins,
                    act,
                    un,
                    "-> "
                    + (
                        m.mem.find(int(addr[np.flatnonzero(un)[0]]))
                        if space == "global"
                        else f"shared[{int(addr[np.flatnonzero(un)[0]])}]"
                    ),
                )
        self.account(m, act, addr, nb, space, "ld", ins, good, o)
        if self.check_races and space == "shared":
            self.race_shared(m, act, o, nb, ins, good, False)
        elif self.check_races and space == "global":
            wt = m.mem.writer[o]
            other = (wt >= 0) & (wt != self.thread_ids(m, act))
            if good is not None:
                other &= good
            if other.any() and not (self.exchanges or self.dynamic_shared):
                m.report("global data written by another thread is read without a barrier", ins, act, other)
            elif other.any():
                blk_w = wt // m.bs
                cross = other & (blk_w != (self.thread_ids(m, act) // m.bs))
                if cross.any():
                    m.report(
                        "note: global data written by another block in this launch is read", ins, act, cross
                    )
        return vals

    def virtual(self, m, act, addr, w, vec, ins, vals=None):
        """Read (vals None) or write a buffer without storage."""
        out, nb = np.zeros((len(addr), vec), U[w]), w * vec
        hit = np.zeros(len(addr), bool)
        mis = (addr & u64(nb - 1)) != 0
        for v in self.mem.virtuals:
            s = (addr >= u64(v.addr)) & (addr <= u64(v.addr + v.nbytes - nb)) & ~mis
            if s.any():
                off = (addr[s] - u64(v.addr)).astype(np.int64)
                if vals is not None:
                    v.log.append((off, vals[s]))
                elif v.fill:
                    out[s] = np.stack([v.fill(off + k * w, w).view(U[w]) for k in range(vec)], 1)
                hit |= s
        if not hit.all():
            k = int(np.flatnonzero(~hit)[0])
            m.report(
                f"{'misaligned' if mis[k] else 'out-of-bounds'} global {'read' if vals is None else 'write'}",
                ins,
                act,
                ~hit,
                "-> " + m.mem.find(int(addr[k])),
            )
        return out

    def thread_ids(self, m, act):
        return (m.cta[act] * m.bs + m.lin[act]).astype(np.int32)

    def write1(self, m, act, addr, w, vec, space, ins, vals, atomic=False):
        if space == "virtual":
            return self.virtual(m, act, addr, w, vec, ins, vals)
        nb = w * vec
        data, state, o, good = self.locate(m, act, addr, nb, space, ins, "write")
        row = (o // u64(nb)).astype(np.int64)
        if good is not None:
            row, vals_, og = row[good], vals[good], o[good]
        else:
            vals_, og = vals, o
        view = data[: len(data) // nb * nb].view(U[w]).reshape(-1, vec)
        if state is not None and not atomic:
            self.race_write(m, act, og, nb, ins, good, space, vals_, view, row)
        view[row] = vals_
        if state is not None:
            sv = state[: len(data) // nb * nb].view(U[w]).reshape(-1, vec)
            if space == "global":
                ro = (sv[row] & U[w](REP[w] * READONLY)).any()
                if ro:
                    m.report("write to a read-only buffer", ins, act)
                sv[row] |= U[w](REP[w] * (STORED))
            else:
                sv[row] = U[w](REP[w])
        self.account(m, act, addr, nb, space, "st", ins, good, o)

    def race_write(self, m, act, og, nb, ins, good, space, vals, view, row):
        if not self.check_races:
            return
        # the same bytes written by two threads in one instruction (different values = a real race)
        if len(row) > 1:
            srt = np.sort(row)
            if (srt[1:] == srt[:-1]).any():
                order = np.argsort(row, kind="stable")
                same = row[order][1:] == row[order][:-1]
                diff = same & (vals[order][1:] != vals[order][:-1]).any(1)
                if diff.any():
                    bad = np.zeros(len(row), bool)
                    bad[order[1:][diff]] = True
                    full = np.zeros(len(np.arange(m.n)[act]), bool)
                    full[np.flatnonzero(good) if good is not None else slice(None)] = bad
                    m.report(
                        f"{space} write-write race: different values to one address by one instruction",
                        ins,
                        act,
                        full,
                    )
        if space == "shared":
            o = np.zeros(len(np.arange(m.n)[act]), np.uint64)
            o[good if good is not None else slice(None)] = og
            self.race_shared(m, act, o, nb, ins, good, True)
        else:
            t = self.thread_ids(m, act)
            t = t if good is None else t[good]
            wr = m.mem.writer
            old = wr[og]
            clash = (old >= 0) & (old != t)
            if clash.any():
                differs = (view[row] != vals).any(1) & clash
                full = np.zeros(len(np.arange(m.n)[act]), bool)
                full[np.flatnonzero(good) if good is not None else slice(None)] = differs
                if differs.any() and nb <= 16 and (old[differs] // m.bs != t[differs] // m.bs).any():
                    m.report("global write-write race between blocks (values differ)", ins, act, full)
            for k in range(nb):
                wr[og + u64(k)] = t

    def race_shared(self, m, act, o, nb, ins, good, is_write):
        """Happens-before by block barriers only; accesses of one warp are not compared."""
        idx = np.arange(m.n)[act]
        if good is not None:
            idx, o = idx[good], o[good]
        ep = m.epoch[m.blk[idx]]
        warp = m.warp[idx].astype(np.int32)
        bad = np.zeros(len(idx), bool)
        kind = ""
        for k in range(0, nb, 1 if nb < 4 else 4):
            p = (o + u64(k)).astype(np.int64)
            raw = (m.w_ep[p] == ep) & (m.w_tid[p] != warp)
            if raw.any():
                kind = "write after write" if is_write else "read after write"
                bad |= raw
            if is_write:
                war = (m.r_ep[p] == ep) & (m.r_tid[p] != warp)
                if war.any():
                    kind = kind or "write after read"
                    bad |= war
                m.w_ep[p], m.w_tid[p] = ep, warp
            else:
                m.r_tid[p] = np.where((m.r_ep[p] == ep) & (m.r_tid[p] != warp), -2, warp)
                m.r_ep[p] = ep
        if bad.any():
            full = np.zeros(len(np.arange(m.n)[act]), bool)
            full[np.flatnonzero(good) if good is not None else slice(None)] = bad
            m.report(f"shared-memory race: {kind} by another warp without a barrier between", ins, act, full)

    def account(self, m, act, addr, nb, space, op, ins, good, o):
        warp = m.warp[act]
        if good is not None:
            warp, addr, o = warp[good], addr[good], o[good]
        if not len(warp):
            return
        if space == "shared":
            r = self.report.shared.setdefault(op, dict(requests=0, cycles=0))
            words = np.unique(warp.astype(np.uint64) << u64(32) | ((addr & u64(0xFFFFFFFF)) >> u64(2)))
            key = (words >> u64(32)) * u64(32) + (words & u64(31))
            _, c = np.unique(key, return_counts=True)
            wk = np.unique(key)
            peak = np.zeros(int((wk >> u64(5)).max()) + 1, np.int64)
            np.maximum.at(peak, (wk >> u64(5)).astype(np.int64), c)
            r["requests"] += int((peak > 0).sum())
            r["cycles"] += int(peak.sum()) if nb <= 4 else int(peak.sum()) * (nb // 4)
            return
        if space != "global":
            return
        lo = np.searchsorted(self.buf_addr, addr.min(), "right") - 1
        hi = np.searchsorted(self.buf_addr, addr.max(), "right") - 1
        for b in range(int(lo), int(hi) + 1):
            buf = self.sorted_bufs[b]
            sel = slice(None) if lo == hi else (addr >= u64(buf.addr)) & (addr < u64(buf.addr + buf.nbytes))
            ad, wp = addr[sel], warp[sel]
            if not len(ad) or buf.name == "(params)":
                continue
            s, w = count_sectors(wp, ad, nb)
            r = self.report.traffic.row((buf.name, op))
            r["requests"] += w
            r["threads"] += len(ad)
            r["bytes"] += len(ad) * nb
            r["sectors"] += s
            off = ad - u64(BASE)
            self.touched[op][(off >> u64(5)).astype(np.int64)] = True

    def atomic(self, m, act, addr, w, space, ins, dt, combine, xs, op, wr):
        parts = self.resolve(m, act, addr, space)
        idx = np.arange(m.n)[act]
        result = np.zeros(len(idx), dt)
        for sp, sel, ad in parts:
            a = idx if sel is None else idx[sel]
            x = [None if v is None else (v if sel is None else v[sel]) for v in xs]
            data, state, o, good = self.locate(m, a, ad, w, sp, ins, "atomic")
            keep = np.arange(len(a)) if good is None else np.flatnonzero(good)
            view = data[: len(data) // w * w].view(dt)
            row = (o // u64(w)).astype(np.int64)[keep]
            order = self.rng.permutation(len(keep)) if self.schedule == "random" else np.arange(len(keep))
            uf = {
                "add": np.add,
                "min": np.minimum,
                "max": np.maximum,
                "and": np.bitwise_and,
                "or": np.bitwise_or,
                "xor": np.bitwise_xor,
            }.get(op)
            if state is not None:
                need = U[w](REP[w] * (INIT if sp == "global" else 1))
                sv = state[: len(data) // w * w].view(U[w])
                un = (sv[row] & need) != need
                if un.any():
                    m.report(f"atomic on uninitialised {sp} memory", ins, a[keep], un)
                sv[row] |= U[w](REP[w] * (STORED if sp == "global" else 1))
            if wr is None and uf is not None and not ins.mods[-1].startswith(("bf16", "f16")):
                uf.at(view, row[order], x[0][keep][order])
            else:
                old = np.zeros(len(keep), dt)
                if len(np.unique(row)) == len(row):
                    old = view[row].copy()
                    view[row] = combine(old, x[0][keep], None if x[1] is None else x[1][keep])
                else:
                    b, c = x[0][keep], (None if x[1] is None else x[1][keep])
                    for k in order:
                        old[k] = view[row[k]]
                        view[row[k]] = combine(
                            old[k : k + 1], b[k : k + 1], None if c is None else c[k : k + 1]
                        )[0]
                res = result if sel is None else np.zeros(len(a), dt)
                res[keep] = old
                if sel is not None:
                    result[sel] = res
            self.account(m, a, ad, w, sp, "st", ins, good, o)
        if wr is not None:
            wr(m, act, result)


_variables = {}  # where each variable of each module lies in every memory, by module and name
_variables_end = 0


def variable_address(module, v):
    """The address of a variable of a module, the same in every memory."""
    global _variables_end
    if (module, v.name) not in _variables:
        start = (_variables_end + 255) // 256 * 256
        _variables_end = start + v.size + RED
        if _variables_end > VARIABLES:
            raise Fault(f"the variables of all modules take more than {VARIABLES} bytes")
        _variables[module, v.name] = VARIABLES_AT + start
    return _variables[module, v.name]


class Device:
    """A simulated GPU memory; kernels are launched against it."""

    def __init__(self):
        self.mem = Global()
        self.placed = set()

    def put(self, array, name="", offset=0, readonly=False):
        return self.mem.put(array, name, offset, readonly)

    def empty(self, shape, dtype=np.float32, name="", offset=0):
        n = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.mem.alloc(n, name, dtype, tuple(np.atleast_1d(shape)), offset)

    def virtual(self, nbytes, name="virtual", fill=None):
        return self.mem.virtual(int(nbytes), name, fill)

    def variable(self, address, v):
        """See that the variable lies at its address, with its first value if it was not there before."""
        if address not in self.placed:
            self.placed.add(address)
            self.mem.place(address, np.frombuffer((v.init or b"").ljust(v.size, b"\0"), np.uint8), v.name)

    def launch(self, module, kernel, grid, block, args, **kw):
        if kernel not in module.launches:
            module.launches[kernel] = Launch(module, kernel)
        return module.launches[kernel](self, grid, block, args, **kw)


def load(path):
    return P.parse(open(path).read())


def compile_cu(path, arch="sm_80", flags=()):
    with tempfile.NamedTemporaryFile(suffix=".ptx") as f:
        subprocess.run(
            [
                "nvcc",
                "-ptx",
                f"-arch={arch}",
                "-std=c++17",
                "-O3",
                *(["-lineinfo"] if "-G" not in flags else []),
                *flags,
                path,
                "-o",
                f.name,
            ],
            check=True,
        )
        return load(f.name)


def find_kernel(module, part):
    """The one kernel whose (mangled) name contains `part`."""
    hit = [n for n, f in module.functions.items() if f.entry and part in n]
    if len(hit) != 1:
        raise KeyError(f"{part}: {hit or [n for n, f in module.functions.items() if f.entry]}")
    return hit[0]
