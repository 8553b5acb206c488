"""PTX text -> Module (variables, functions, flat list of instructions).

Only the syntax that nvcc / nvrtc / clang emit is handled.  Registers are renamed per scope, so
the `{ .reg .b16 lo, hi; ... }` blocks of the fp16/bf16 headers are safe.

A module of templates holds hundreds of kernels, of which a test launches a few.  Hence the body of a function
is read when somebody asks for its code.
"""

import re
import struct

SIZES = {
    "pred": 1,
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "b128": 16,
}

TOKEN = re.compile(
    r'"[^"]*"|[%$_a-zA-Z.][\w$.%]*(?:::[\w.]+)*|-?\d\w*(?:\.\d+)?(?:[eE][-+]?\d+)?|[{}()\[\],;:|@!+<>=-]'
)


class PtxError(Exception):
    pass


class Reg:
    __slots__ = ("idx", "name", "type")

    def __init__(self, name, type_, idx):
        self.name, self.type, self.idx = name, type_, idx

    def __repr__(self):
        return self.name


class Imm:  # integer value, or raw bits with the float width in `fbits`
    __slots__ = ("fbits", "value")

    def __init__(self, value, fbits=0):
        self.value, self.fbits = value, fbits

    def __repr__(self):
        return f"Imm({self.value:#x})"


class Special:
    __slots__ = ("name",)

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name


class Sym:
    __slots__ = ("name",)

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name


class Addr:
    __slots__ = ("base", "offset")

    def __init__(self, base, offset):
        self.base, self.offset = base, offset

    def __repr__(self):
        return f"[{self.base}+{self.offset}]"


class Vec(list):
    pass


class Not:
    __slots__ = ("reg",)

    def __init__(self, reg):
        self.reg = reg


class Var:
    """A .param/.shared/.local/.global/.const variable."""

    def __init__(self, space, name, size, align, init=None, extern=False):
        self.space, self.name, self.size, self.align, self.init, self.extern = (
            space,
            name,
            size,
            align,
            init,
            extern,
        )
        self.addr = None


class Instr:
    __slots__ = ("args", "fn", "line", "loc", "mods", "neg", "op", "pred", "target", "text")

    def __repr__(self):
        return self.text


class Function:
    def __init__(self, name, entry):
        self.name, self.entry = name, entry
        self.params, self.rets, self.vars = [], [], {}
        self.regs, self.instructions, self.labels, self.tables = [], [], {}, {}
        self.maxntid = None
        self.local_size = 0
        self.unread = None  # (parser, text, first line) of the body

    @property
    def code(self):
        """The instructions; the body, with its registers, labels and variables, has been read then."""
        if self.unread is not None:
            (parser, text, line), self.unread = self.unread, None
            parser.tokenize(text, line)
            parser.body(self)
        return self.instructions


def imm(tok):
    t = tok.rstrip("U")
    if t[:2] in ("0f", "0F"):
        return Imm(int(t[2:], 16), 32)
    if t[:2] in ("0d", "0D"):
        return Imm(int(t[2:], 16), 64)
    if "." in t:
        return Imm(struct.unpack("<Q", struct.pack("<d", float(t)))[0], 64)
    neg = t.startswith("-")
    t = t.lstrip("-")
    v = int(t, 8) if len(t) > 1 and t[0] == "0" and t[1].isdigit() else int(t, 0)
    return Imm(-v if neg else v)


class Parser:
    def __init__(self, text):
        text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.S)
        self.src = text.split("\n")
        text = re.sub(r"//.*", "", text)
        # What the braces of a function enclose is kept as text, with the number of its first line. Of the
        # body only its line ends stay in what is read first.
        self.bodies, outside, depth, at = [], [], 0, 0
        for m in re.finditer(r"[{}]", text):
            depth += 1 if m.group() == "{" else -1
            if depth == 1 and m.group() == "{":
                header = re.split("[;}]", text[at : m.start()])[-1]
                start = m.end() if re.search(r"\.(entry|func)\b", header) else None
            elif depth == 0 and start is not None:
                outside.append(text[at:start])
                line = 1 + text.count("\n", 0, start)
                self.bodies.append((text[start : m.end()], line))
                outside.append("\n" * text.count("\n", start, m.end()))
                at = m.end()
        self.tokenize("".join([*outside, text[at:]]), 1)
        self.bodies.reverse()
        self.globals, self.functions = {}, {}
        self.launches = {}  # what launch.py has linked, by the name of the kernel
        self.files = {int(n): p for n, p in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)}
        self.version = self.target = None

    def tokenize(self, text, first):
        """Make `text`, whose first line has the number `first`, what is read next."""
        self.toks, self.lines, self.i = [], [], 0
        for number, line in enumerate(text.split("\n"), first):
            for token in TOKEN.findall(line):
                self.toks.append(token)
                self.lines.append(number)

    def peek(self):
        return self.toks[self.i] if self.i < len(self.toks) else None

    def next(self):
        self.i += 1
        return self.toks[self.i - 1]

    def accept(self, t):
        if self.peek() == t:
            self.i += 1
            return True
        return False

    def expect(self, t):
        if self.next() != t:
            raise PtxError(f"line {self.lines[self.i - 1]}: expected {t!r}, got {self.toks[self.i - 1]!r}")

    def skip_statement(self):
        while self.next() != ";":
            pass

    # -- module level -----------------------------------------------------------------------
    def module(self):
        while self.peek() is not None:
            t = self.peek()
            if t == ".version":
                self.next()
                self.version = self.next()
            elif t == ".target":
                self.next()
                self.target = self.next()
                while self.accept(","):
                    self.next()
            elif t == ".address_size":
                self.next()
                self.next()
            elif t == ".file":
                self.next()
                n = int(self.next())
                self.files[n] = self.next().strip('"')
                while self.accept(","):
                    self.next()
            elif t == ".section":
                while self.next() != "}":
                    pass
            elif t in (
                ".visible",
                ".extern",
                ".weak",
                ".common",
                ".global",
                ".const",
                ".shared",
                ".entry",
                ".func",
            ):
                self.toplevel()
            elif t == ".pragma":
                self.skip_statement()
            else:
                raise PtxError(f"line {self.lines[self.i]}: unexpected {t!r} at module level")
        return self

    def toplevel(self):
        extern = False
        while self.peek() in (".visible", ".extern", ".weak", ".common"):
            extern |= self.next() == ".extern"
        t = self.next()
        if t in (".global", ".const", ".shared"):
            v = self.variable(t[1:], extern)
            self.globals[v.name] = v
            return
        if t not in (".entry", ".func"):
            raise PtxError(f"line {self.lines[self.i - 1]}: unexpected {t!r}")
        rets = self.params() if t == ".func" and self.peek() == "(" else []
        while self.peek() == ".noreturn":
            self.next()
        f = Function(self.next(), t == ".entry")
        f.rets = rets
        f.params = self.params() if self.peek() == "(" else []
        while self.peek() not in ("{", ";"):
            d = self.next()
            if d == ".maxntid" or d == ".reqntid":
                f.maxntid = [int(self.next())]
                while self.accept(","):
                    f.maxntid.append(int(self.next()))
        if self.accept(";"):
            self.functions.setdefault(f.name, f)
            return
        self.expect("{")
        for p in f.params + f.rets:
            f.vars[p.name] = p
        f.unread = (self, *self.bodies.pop())
        self.functions[f.name] = f

    def params(self):
        self.expect("(")
        out = []
        while not self.accept(")"):
            self.next()  # .param or .reg
            out.append(self.variable("param", False, end=(",", ")")))
            self.accept(",")
        return out

    def variable(self, space, extern, end=(";",)):
        align = elem = None
        while True:
            t = self.next()
            if t == ".align":
                align = int(self.next())
            elif t.startswith(".") and t[1:] in SIZES:
                elem = SIZES[t[1:]]
            elif t in (".ptr", ".global", ".const", ".shared", ".local", ".managed", ".attribute"):
                if t == ".attribute":
                    while self.next() != ")":
                        pass
                if t == ".ptr" and self.peek() == ".align":
                    self.next()
                    self.next()
            elif t in (".v2", ".v4"):
                elem_mul = int(t[2])
                elem = ("v", elem_mul)
            else:
                name = t
                break
        count = 1
        while self.accept("["):
            count = 0 if self.peek() == "]" else count * int(self.next())
            self.expect("]")
        init = None
        if self.accept("="):
            init = self.initializer(elem)
        while self.peek() not in end:
            self.next()
        if end == (";",):
            self.next()
        return Var(space, name, elem * count, align or elem, init, extern)

    def initializer(self, elem):
        out, depth = [], 0
        while True:
            t = self.next()
            depth += (t == "{") - (t == "}")
            if t not in "{},":
                v = imm(t)  # symbol initialisers are not supported (imm raises)
                out.append((v.value & ((1 << (8 * elem)) - 1)).to_bytes(elem, "little"))
            if depth == 0:
                return b"".join(out)

    def place(self, fileno, line):
        return f"{self.files.get(int(fileno), fileno).split('/')[-1]}:{line}"

    # -- function body ----------------------------------------------------------------------
    def body(self, f):
        scopes, loc = [{}], None
        while True:
            t = self.peek()
            if t == "{":
                self.next()
                scopes.append({})
            elif t == "}":
                self.next()
                scopes.pop()
                if not scopes:
                    return
            elif t == ".reg":
                self.next()
                self.reg_decl(f, scopes[-1])
            elif t in (".shared", ".local", ".param"):
                self.next()
                v = self.variable(t[1:], False)
                unique = v.name if v.name not in f.vars else f"{v.name}@{len(f.vars)}"
                scopes[-1]["&" + v.name] = unique  # param0 is declared anew in every call sequence
                f.vars[unique] = v
                if t == ".param":  # call argument: lives in the per-thread frame
                    v.space = "local"
                if v.space == "local":
                    a = max(v.align, 1)
                    v.addr = (f.local_size + a - 1) // a * a
                    f.local_size = v.addr + v.size
            elif t == ".loc":  # keep file:line and, for inlined code, the place it was inlined at
                ln = self.lines[self.i]
                words = []
                while self.lines[self.i] == ln:
                    words.append(self.next())
                loc = self.place(words[1], words[2])
                if "inlined_at" in words:
                    k = words.index("inlined_at")
                    loc += " inlined at " + self.place(words[k + 1], words[k + 2])
            elif t == ".pragma" or t.startswith(".branchtargets") or t.startswith(".callprototype"):
                self.skip_statement()
            elif self.toks[self.i + 1] == ":":
                f.labels[self.next()] = len(f.instructions)
                self.next()
                if self.peek() == ".branchtargets":
                    name, _ = f.labels.popitem()
                    self.next()
                    table = []
                    while not self.accept(";"):
                        table.append(self.next())
                        self.accept(",")
                    f.tables[name] = table
            else:
                ins = self.instr(f, scopes, loc)
                f.instructions.append(ins)
                if ins.op == "call":  # a second step, run on return, copies the results back
                    back = Instr()
                    for k in Instr.__slots__:
                        setattr(back, k, getattr(ins, k))
                    back.op = "callret"
                    f.instructions.append(back)

    def reg_decl(self, f, scope):
        type_ = self.next()[1:]
        while True:
            name = self.next()
            if self.accept("<"):
                int(self.next())
                self.expect(">")
                scope["*" + name] = (type_, {})
            else:
                scope[name] = self.new_reg(f, name, type_)
            if self.accept(";"):
                return
            self.expect(",")

    @staticmethod
    def new_reg(f, name, type_):
        r = Reg(name, type_, len(f.regs))
        f.regs.append(r)
        return r

    def lookup(self, f, scopes, name):
        for s in reversed(scopes):
            if name in s:
                return s[name]
            m = re.fullmatch(r"(.*?)(\d+)", name)
            if m:
                # longest declared prefix: %rd12 is declared as %rd<..>, %r12 as %r<..>
                fam = s.get("*" + m.group(1))
                if fam:
                    s[name] = self.new_reg(f, name, fam[0])
                    return s[name]
        return None

    def operand(self, f, scopes):
        t = self.next()
        if t == "{":
            v = Vec()
            while not self.accept("}"):
                v.append(self.operand(f, scopes))
                self.accept(",")
            return v
        if t == "[":
            base = self.operand(f, scopes)
            off = 0
            while self.peek() != "]":
                k = self.next()
                if k == "+":
                    off += imm(self.next()).value
                elif k == "-":
                    off -= imm(self.next()).value
                elif re.fullmatch(r"-\d+", k):
                    off += int(k)
                else:
                    raise PtxError(f"line {self.lines[self.i]}: address form not supported near {k!r}")
            self.next()
            return Addr(base, off)
        if t == "(":
            v = Vec()
            while not self.accept(")"):
                v.append(self.operand(f, scopes))
                self.accept(",")
            return v
        if t == "!":
            return Not(self.operand(f, scopes))
        if t == "_":
            return None
        if t[0].isdigit() or t[0] == "-":
            return imm(t)
        r = self.lookup(f, scopes, t)
        if r is not None:
            return r
        if t[0] == "%":
            return Special(t)
        for sc in reversed(scopes):
            if "&" + t in sc:
                return Sym(sc["&" + t])
        return Sym(t)

    def instr(self, f, scopes, loc):
        ins = Instr()
        ins.line, ins.loc, ins.pred, ins.neg, ins.target, ins.fn = (
            self.lines[self.i],
            loc,
            None,
            False,
            None,
            f,
        )
        ins.text = self.src[ins.line - 1].strip()
        if self.accept("@"):
            ins.neg = self.accept("!")
            ins.pred = self.lookup(f, scopes, self.next())
        parts = self.next().split(".")
        ins.op, ins.mods, ins.args = parts[0], [m for m in parts[1:] if m], []
        while not self.accept(";"):
            o = self.operand(f, scopes)
            if self.accept("|"):
                o = (o, self.operand(f, scopes))
            ins.args.append(o)
            self.accept(",")
        return ins


def parse(text):
    return Parser(text).module()
