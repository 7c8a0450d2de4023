"""bench_sparse_long: bench_sparse on sequences of 8,192 tokens, where attention weighs more.

Run: python -m benchmarks.bench_sparse_long [--tiny]
"""

from benchmarks import bench_sparse
from scripts.arguments import Arguments


def main(arguments: list[str] | None = None) -> int:
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small case that finishes at once")
    settings = parser.parse_args(arguments)
    return bench_sparse.main(["--tiny"] if settings.tiny else ["--case", "long"])


if __name__ == "__main__":
    raise SystemExit(main())
