"""SIMT execution of PTX, vectorised over the threads of many blocks at once.

Scheduling: every thread has its own program counter.  At each step the runnable threads with the lowest
PC run one straight-line stretch together (so divergent paths reconverge at the join), or, with
schedule="random"/"serial"/"serial-reverse", only a chosen subset of warps does (see run): other legal
interleavings, under which a missing barrier shows as uninitialised shared reads or wrong results.
Barriers are per block; shfl/vote/match/redux/bar.warp.sync wait for the lanes their mask names.
"""

import numpy as np

from .alu import u32, u64

RUN, AT_BAR, AT_WARP, DONE = 0, 1, 2, 3
FULL = slice(None)  # the one object that stands for "all threads"
BIG = np.int32(2**31 - 1)
SPACES = {"global", "shared", "local", "param", "const"}
RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Fault(Exception):
    pass


class Machine:
    """State of one batch of blocks."""

    def __init__(self, launch, blocks):
        self.L, self.mem = launch, launch.mem
        bx, by, bz = launch.block
        gx, gy, gz = launch.grid
        self.bs = bs = bx * by * bz
        self.nb = nb = len(blocks)
        self.n = n = nb * bs
        lin = np.tile(np.arange(bs, dtype=np.int64), nb)
        blk = np.repeat(np.arange(nb, dtype=np.int64), bs)
        cta = np.repeat(np.asarray(blocks, np.int64), bs)
        self.lin, self.blk, self.cta = lin, blk, cta
        self.wpb = (bs + 31) // 32
        self.lane = (lin & 31).astype(u32)
        self.warp = (blk * self.wpb + lin // 32).astype(np.int64)
        self.exists = self.by_warp(np.ones(n, bool))
        self.special = {
            "%tid.x": lin % bx,
            "%tid.y": lin // bx % by,
            "%tid.z": lin // (bx * by),
            "%ctaid.x": cta % gx,
            "%ctaid.y": cta // gx % gy,
            "%ctaid.z": cta // (gx * gy),
            "%laneid": lin & 31,
            "%warpid": lin // 32,
        }
        self.special = {k: v.astype(u32) for k, v in self.special.items()}
        self.uniform = {
            "%ntid.x": bx,
            "%ntid.y": by,
            "%ntid.z": bz,
            "%nctaid.x": gx,
            "%nctaid.y": gy,
            "%nctaid.z": gz,
            "WARP_SZ": 32,
            "%nwarpid": self.wpb,
            "%smid": 0,
            "%nsmid": 1,
            "%dynamic_smem_size": launch.dynamic_shared,
            "%total_smem_size": launch.shared_size,
            "%clock": 0,
            "%clock64": 0,
            "%globaltimer": 0,
        }
        self.pc = np.full(n, launch.entry_pc, np.int32)
        self.st = np.zeros(n, np.int8)
        self.key = self.pc.copy()  # pc where runnable, BIG elsewhere
        self.regs = [None] * launch.nregs
        self.S = max(16, (launch.shared_size + 15) // 16 * 16)
        self.shared = np.zeros(nb * self.S, np.uint8)
        self.shared_init = np.zeros(nb * self.S, np.uint8)
        self.Lsz = max(16, (launch.local_size + 15) // 16 * 16)
        self.local = np.zeros(n * self.Lsz, np.uint8) if launch.local_size else np.zeros(16, np.uint8)
        self.barid = np.zeros(n, np.int8)
        self.barcnt = np.zeros(n, np.int32)
        self.ret = {}
        self.epoch = np.zeros(nb, np.int32)  # barriers passed, per block
        if launch.check_races:
            z = nb * self.S
            self.w_ep, self.w_tid = np.full(z, -1, np.int32), np.zeros(z, np.int32)
            self.r_ep, self.r_tid = np.full(z, -1, np.int32), np.zeros(z, np.int32)

    # -- helpers --------------------------------------------------------------------------------
    def by_warp(self, flag, act=slice(None)):
        """Bit mask per warp of the lanes in `act` whose flag is set."""
        w = np.bincount(
            self.warp[act],
            weights=(flag.astype(np.float64) * (2.0 ** self.lane[act])),
            minlength=self.nb * self.wpb,
        )
        return w.astype(u64).astype(u32)

    def report(self, kind, ins, act, where=None, extra=""):
        idx = np.arange(self.n)[act] if where is None else np.arange(self.n)[act][where]
        if len(idx):
            t = int(idx[0])
            self.L.report.add(
                kind, ins, len(idx), f"block {int(self.cta[t])} thread {int(self.lin[t])}", extra
            )

    # -- main loop --------------------------------------------------------------------------------
    def run(self):
        L, key, pc, st = self.L, self.key, self.pc, self.st
        code, full, n = L.exec, FULL, self.n
        rng, steps, budget = L.rng, 0, L.max_steps
        while True:
            steps += 1
            if steps > budget:
                raise Fault("step limit reached: endless loop?")
            m = int(key.min())
            if m == BIG:
                if (st == DONE).all():
                    return
                if not self.release():
                    self.deadlock()
                continue
            sub = None
            if L.schedule == "random":  # a random half of the runnable warps
                wr = np.unique(self.warp[key != BIG])
                pick = rng.choice(wr, size=max(1, int(rng.integers(1, len(wr) + 1)) // 2), replace=False)
                sub = np.isin(self.warp, pick) & (key != BIG)
                m = int(key[sub].min())
            elif L.schedule in ("serial", "serial-reverse"):  # in each block one warp runs as far as it can
                can = (key != BIG).reshape(self.nb, self.bs)
                if L.schedule == "serial":
                    w = can.argmax(1) // 32
                else:
                    w = (self.bs - 1 - can[:, ::-1].argmax(1)) // 32
                sub = (can & (self.lin.reshape(self.nb, self.bs) // 32 == w[:, None])).reshape(-1)
                m = int(key[sub].min())
            elif steps % 256 == 0:  # fairness: let a spinning lock holder get on
                m = int(rng.choice(np.unique(key[key != BIG])))
            eq = key == m
            if sub is not None:
                eq &= sub
            cnt = int(np.count_nonzero(eq))
            act = full if cnt == n else np.flatnonzero(eq)
            i = m
            L.visits[m] = L.visits.get(m, 0) + cnt
            while True:  # straight-line stretch
                step = code[i] or L.compiled(i)
                r = step(self, act)
                i += 1
                if r is not None:  # control transfer: the step has set pc/st itself
                    break
                if i in L.leaders:
                    pc[act] = i
                    key[act] = i
                    break
            L.count(m, i, act, self)

    def goto(self, act, target):
        self.pc[act] = target
        self.key[act] = target

    def park(self, act, state, pc):
        self.pc[act] = pc
        self.st[act] = state
        self.key[act] = BIG

    def wake(self, idx, pc):
        self.st[idx] = RUN
        self.pc[idx] = pc
        self.key[idx] = pc

    def release(self):
        """Let blocks whose barrier is complete go on.  True if any did."""
        moved = False
        parked = np.flatnonzero(self.st == AT_WARP)  # lanes they wait for may have exited since
        for p in np.unique(self.pc[parked]):
            idx = parked[self.pc[parked] == p]
            here = self.by_warp(np.ones(len(idx), bool), idx)[self.warp[idx]]
            alive = self.by_warp(self.st != DONE)[self.warp[idx]]
            ok = (self.wmask[idx] & alive & ~here) == 0
            if ok.any():
                self.wake(idx[ok], int(p))  # they execute the instruction again, now complete
                moved = True
        waiting = self.st == AT_BAR
        if moved or not waiting.any():
            return moved
        done = np.bincount(self.blk[self.st == DONE], minlength=self.nb)
        for b in np.unique(self.barid[waiting]):
            at = waiting & (self.barid == b)
            arrived = np.bincount(self.blk[at], minlength=self.nb)
            need = np.full(self.nb, self.bs)
            need[self.blk[at]] = np.where(self.barcnt[at] > 0, self.barcnt[at], self.bs)
            whole = need == self.bs
            ok = (arrived > 0) & np.where(whole, arrived + done >= need, arrived >= need)
            if not ok.any():
                continue
            go = np.flatnonzero(at & ok[self.blk])
            left = ok & whole & (done > 0)
            if left.any():
                self.report(
                    "note: barrier released although some threads of the block have exited",
                    self.L.code[int(self.pc[go[0]])],
                    go,
                    left[self.blk[go]],
                )
            pcs = self.pc[go]
            lo, hi = np.full(self.nb, BIG), np.full(self.nb, -1)
            np.minimum.at(lo, self.blk[go], pcs)
            np.maximum.at(hi, self.blk[go], pcs)
            if (hi[ok] != lo[ok]).any():
                self.report(
                    "divergent barrier (threads wait at different bar.sync)", self.L.code[int(pcs[0])], go
                )
            self.epoch[ok] += 1
            self.L.barrier_done(self, go, pcs)
            self.wake(go, pcs + 1)
            moved = True
        return moved

    def deadlock(self):
        lines = []
        for s, name in ((AT_BAR, "barrier"), (AT_WARP, "warp-sync")):
            for p in np.unique(self.pc[self.st == s]):
                k = np.flatnonzero((self.st == s) & (self.pc == p))
                lines.append(
                    f"{len(k)} threads wait at {name} {self.L.code[int(p)].text!r} "
                    f"(PTX line {self.L.code[int(p)].line}; "
                    f"e.g. block {int(self.cta[k[0]])} thread {int(self.lin[k[0]])})"
                )
        raise Fault("deadlock: " + "; ".join(lines))

    def finish(self, act):
        self.st[act] = DONE
        self.key[act] = BIG

    def warp_ready(self, act, mask, ins, pc):
        """Split `act` into threads whose whole (alive) mask is here, and the rest, which wait.
        Threads already waiting at this pc join in.  Returns (ready index array, mask for them)."""
        idx = np.arange(self.n)[act]
        mask = np.broadcast_to(mask, idx.shape).astype(u32)
        if "wmask" not in self.__dict__:
            self.wmask = np.zeros(self.n, u32)
        self.wmask[idx] = mask
        waiting = np.flatnonzero((self.st == AT_WARP) & (self.pc == pc))
        if len(waiting):
            idx = np.union1d(idx, waiting)
            mask = self.wmask[idx]
        here = self.by_warp(np.ones(len(idx), bool), idx)[self.warp[idx]]
        alive = self.by_warp(self.st != DONE)[self.warp[idx]]
        exists = self.exists[self.warp[idx]]
        own = (mask >> self.lane[idx]) & u32(1)
        if (own == 0).any():
            self.report("lane not in its own sync mask", ins, idx, own == 0)
        gone = (mask & exists & ~alive) != 0
        if gone.any():
            self.report("note: sync mask names lanes that have exited", ins, idx, gone)
        ok = (mask & alive & ~here) == 0
        if not ok.all():
            self.park(idx[~ok], AT_WARP, pc)
        return idx[ok], mask[ok]
