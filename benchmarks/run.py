"""All benchmarks as one Markdown table, one thread: `make bench`, or `make bench ARGS=--quick`."""

import argparse

import _timing
import bench_cross_entropy
import bench_dropout
import bench_fgsm
import bench_sgd
import torch


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without the largest sizes")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [r for module in (bench_dropout, bench_cross_entropy, bench_sgd, bench_fgsm) for r in module.cases(arguments.quick)]
    print(_timing.table(rows))


if __name__ == "__main__":
    main()
