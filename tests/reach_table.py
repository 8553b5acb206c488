"""Write docs/reach.md: python tests/reach_table.py"""

from reach_cases import FUNCTIONS, LIBRARIES, MODULES, WAYS, row
from test_reach import PAGE

HEAD = """# What `patch` and `convert` reach

`fr.patch()` changes functions of torch for the whole process, `fr.convert(model)` the modules of one model.
✓: all dropout and cross-entropy of the row runs on fastreg; "in part": some of it; –: it stays torch's, with
the same results as before. The rows are measured, on a CPU, by the operators that run:
`python tests/reach_table.py` writes this page, and `tests/test_reach.py` keeps it current.

Neither reaches optimisers: `torch.optim.SGD` stays torch's, and `fr.optim.SGD` is used by name (or by
`--fastreg-optim` of the [pytest plugin](guide.md)). What does not name a function of `torch.nn.functional`
cannot be reached: C++ programs and extensions, which call the `aten` operators, scripted modules, kernels
of RNNs, and fused kernels of other libraries. On a GPU, dropout under `torch.compile` stays with the
compiler, and attention with dropout stays torch's.
"""


def main():
    parts = [HEAD]
    for title, cases in (
        ("Functions", FUNCTIONS),
        ("Modules", MODULES),
        ("Ways of running them", WAYS),
        ("Other libraries", LIBRARIES),
    ):
        parts.append(f"## {title}\n\n| | patch | convert |\n|---|---|---|")
        parts[-1] += "".join("\n" + row(name) for name in cases) + "\n"
    PAGE.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
