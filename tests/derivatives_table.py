"""Write docs/derivatives.md: python tests/derivatives_table.py"""

from derivative_cases import CASES, COMPILED, WAYS
from test_derivatives import PAGE, outcome, outcome_compiled, table_row

HEAD = """# Derivatives

Every differentiable operator of fastreg on every way that torch has to a derivative. ✓: the value that
torch's own operators give, to nine digits in float64. "error": torch's own vmap refuses random numbers there
and says so. There is no silent zero. `tests/test_derivatives.py` checks each cell;
`python tests/derivatives_table.py` writes this page.

Outside of plain backward passes (transforms of `torch.func`, forward mode, a derivative of a derivative of
augmented images) an op is made of torch's operators: right, but as slow as those, and a class index out of
range inside `vmap` gives NaN instead of an error, because `vmap` cannot look at values. Under `vmap` dropout
takes `randomness="same"` or `"different"`, as torch's.

DTensors have backward passes, also of backward passes, one gradient at a time; a loss whose classes are split
has the first alone and says so. Under `torch.func` their losses are torch's, so far as
torch has derivatives there, and every other function raises an error that says what to do, as a batch of
gradients does (`tests/test_dtensor.py`).

"""


def main():
    ways = (*WAYS, *COMPILED)
    compiled = {way: outcome_compiled(way) for way in COMPILED}
    lines = ["| | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    lines += [table_row(case, {way: outcome(case, way) for way in WAYS} | compiled) for case in CASES]
    PAGE.write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
