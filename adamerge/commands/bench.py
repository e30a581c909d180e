"""`adamerge bench run BENCHMARK`: a table of methods on one benchmark."""

from pathlib import Path

from adamerge.benchmark import Benchmark, configs, oracles
from adamerge.errors import InputError, nearest
from adamerge.static import METHODS


def bench(
    action: str,
    benchmark: str,
    *,
    methods: list[str] | None = None,
    out: str | None = None,
) -> int:
    """Run methods on a benchmark, one row each; rows that were finished before are not computed again.

    Args:
        action: What to do: run.
        benchmark: A YAML file of base, experts and tasks, or the name of a shipped one: embedded.
        methods: Names, separated by commas or repeated: zero_shot, individual, any static method or oracle,
            or a file of configs/methods. Default: the bounds, and all static methods and oracles.
        out: Folder of the table and the rows; default: runs/bench/BENCHMARK.
    """
    if action != "run":
        raise InputError(f"there is no action {action!r}.", "Write: adamerge bench run BENCHMARK")
    file = Path(benchmark)
    if not file.is_file():
        shipped = {path.stem: path for path in (configs() / "benchmarks").glob("*.yaml")}
        if benchmark not in shipped:
            raise InputError(f"there is no benchmark {benchmark!r}.", nearest(benchmark, shipped))
        file = shipped[benchmark]
    names = [name for item in methods or () for name in item.split(",")]
    names = names or ["zero_shot", "individual", *sorted(METHODS), *oracles()]
    table = Benchmark(file, Path(out) if out else Path("runs") / "bench" / file.stem)
    table.write(table.run(names), f"{file.stem}: top-1 accuracy, %")
    return 0
